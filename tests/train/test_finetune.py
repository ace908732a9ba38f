"""Every named way to fine-tune trains what it says, our models and those of transformers alike, and the loss falls."""

from __future__ import annotations

from functools import partial
from statistics import fmean

import pytest
import torch
from transformers import TrainingArguments

from moeify import Recipe, sparsify
from moeify.routers import Lookup
from moeify.sparsify import fresh
from moeify.train import SparseTrainer, finetune, trainable
from moeify.train.finetune import fine_tunings
from moeify.train.freeze import part_of
from tiny_models import causal_lm, deepseek_v3, mixtral, tokens


def ours(**recipe):
    torch.manual_seed(0)
    return sparsify(causal_lm("llama"), Recipe(num_experts=4, experts=fresh, **recipe), verbose=False)


MODELS = {"ours": ours, "mixtral": mixtral, "deepseek_v3": deepseek_v3}
CASES = [(name, model) for name in fine_tunings for model in MODELS if model == "ours" or name != "dropout"]


def trainer(model, folder, sparse, steps):
    settings = {"max_steps": steps, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 2e-2}
    settings |= {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    return SparseTrainer(model, TrainingArguments(folder, **settings), train_dataset=data, sparse=sparse)


@pytest.mark.parametrize(("name", "family"), CASES)
def test_each_way_learns_and_leaves_alone_what_it_freezes(name, family, tmp_path):
    model, way = MODELS[family](), fine_tunings[name]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = trainer(model, tmp_path, finetune(model, name, verbose=False), steps=12)
    run.train()
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert fmean(losses[-3:]) < fmean(losses[:3]) - 0.1
    belongs = part_of(model)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) == (belongs[n] in way.frozen), n


def test_the_base_alone_is_most_of_no_mixture():
    model = mixtral()
    finetune(model, "base", verbose=False)
    table = trainable(model)
    assert table["router"].trained == table["experts"].trained == 0
    assert table.total.share < 0.5


def test_dropout_inside_the_experts_is_refused_where_there_is_none(tmp_path):
    model = mixtral()
    with pytest.raises(ValueError, match="no experts of moeify"):
        trainer(model, tmp_path, finetune(model, "dropout"), steps=1).train()


def test_a_router_without_parameters_need_not_be_frozen():
    model = ours(router=partial(Lookup, key="input_ids"))
    finetune(model, "base", verbose=False)
    assert trainable(model)["experts"].trained == 0


def test_a_dense_model_and_an_unknown_name_are_refused():
    with pytest.raises(ValueError, match="no parameter in 'router'"):
        finetune(causal_lm("llama"), "flan")
    with pytest.raises(ValueError, match="choose from all, base, attention, dropout, flan"):
        finetune(mixtral(), "lora")


def test_each_way_names_its_paper():
    for way in fine_tunings.values():
        assert "arXiv" in way.source
        assert way.found.endswith(".")
