"""Parts of a model that are frozen stay as they are, bit for bit, and everything else goes on learning."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from transformers import TrainingArguments

from moeify import Recipe, sparsify
from moeify.losses import balance
from moeify.routers import Lookup
from moeify.sparsify import dense, fresh
from moeify.train import SparseArguments, SparseTrainer, freeze, trainable, unfreeze
from moeify.train.freeze import BASE, PARTS, part_of
from tiny_models import DENSE, SPARSE, TINY, causal_lm, inputs, tokens


def llama(**recipe):
    torch.manual_seed(0)
    parts = {"experts": fresh, "shared": dense} | recipe
    return sparsify(causal_lm("llama"), Recipe(num_experts=4, **parts), verbose=False)


MODELS = SPARSE | {"ours": llama}


def data(rows=16):
    return [{"input_ids": row, "labels": row} for row in tokens(rows)]


def trainer(model, folder, sparse, **options):
    small = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": [], "use_cpu": True}
    arguments = TrainingArguments(folder, **small | {"disable_tqdm": True, "weight_decay": 0.1} | options)
    return SparseTrainer(model, arguments, train_dataset=data(), sparse=sparse)


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", [*TINY, "ours"])
def test_every_parameter_belongs_to_one_part(name):
    model = (TINY | MODELS)[name]()
    table = trainable(model)
    assert sum(row.parameters for row in table.rows) == sum(p.numel() for p in model.parameters())
    assert table.total.tensors == len(list(model.parameters()))
    assert set(table.parts) <= set(PARTS)
    assert {"router", "experts"} <= set(table.parts) or name in DENSE


@pytest.mark.parametrize(
    ("name", "parameter", "part"),
    [
        ("mixtral", "model.layers.0.mlp.gate.weight", "router"),
        ("gpt_oss", "model.layers.0.mlp.router.bias", "router"),
        ("deepseek_v3", "model.layers.1.mlp.experts.down_proj", "experts"),
        ("deepseek_v3", "model.layers.1.mlp.shared_experts.up_proj.weight", "shared"),
        ("deepseek_v3", "model.layers.0.mlp.up_proj.weight", "rest"),
        ("deepseek_v3", "model.layers.1.self_attn.q_a_layernorm.weight", "norms"),
        ("qwen3_moe", "model.layers.1.self_attn.q_proj.weight", "attention"),
        ("ours", "model.layers.0.mlp.router.weight", "router"),
        ("ours", "model.layers.0.mlp.experts.gate_up_proj", "experts"),
        ("ours", "model.layers.0.mlp.shared.down.weight", "shared"),
        ("ours", "model.layers.0.post_attention_layernorm.weight", "norms"),
        ("ours", "lm_head.weight", "rest"),
        ("gpt2", "transformer.wpe.weight", "embeddings"),
        ("bert", "bert.encoder.layer.0.attention.output.dense.weight", "attention"),
        ("vit", "vit.embeddings.cls_token", "embeddings"),
        ("t5", "shared.weight", "embeddings"),
    ],
)
def test_parts_are_what_their_names_say(name, parameter, part):
    assert part_of((TINY | MODELS)[name]())[parameter] == part


@pytest.mark.parametrize("part", ["router", "experts", "base"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_frozen_stays_as_it_is_and_the_rest_learns(name, part, tmp_path):
    model = MODELS[name]()
    freeze(model, part, verbose=False)
    before, belongs = snapshot(model), part_of(model)
    run = trainer(model, tmp_path, SparseArguments(balance=0.0 if part == "router" else 0.01))
    run.train()
    frozen = {n for n, p in belongs.items() if p == part or (part == "base" and p in BASE)}
    assert frozen
    for parameter, value in model.named_parameters():
        assert torch.equal(value, before[parameter]) == (parameter in frozen), parameter
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for n, p in model.named_parameters() if n not in frozen}


def test_an_optimizer_that_holds_a_part_already_leaves_it_once_it_is_frozen():
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(2):
        model(**inputs(model)).loss.backward()
        if step == 1:
            freeze(model, "router", verbose=False)
            before = snapshot(model)
        optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, part in part_of(model).items() if part != "router"}


def test_the_table_says_what_learns(capsys):
    model = llama()
    freeze(model, "experts", "shared")
    assert "experts" in (text := capsys.readouterr().out)
    assert "0.0%" in text
    table = trainable(model)
    assert table["experts"].trained == table["shared"].trained == 0
    assert table["router"].share == 1.0
    assert table.total.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    unfreeze(model, "experts", verbose=False)
    assert trainable(model)["experts"].share == 1.0
    assert trainable(model)["shared"].share == 0.0


def test_a_module_or_an_expression_can_be_named_in_the_place_of_a_part():
    model = llama()
    freeze(model, "model.layers.0", re.compile(r"layers\.1\..*norm"), verbose=False)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        n for n in snapshot(model) if n.startswith("model.layers.0.") or ("layers.1" in n and "norm" in n)
    }


@pytest.mark.parametrize("part", ["gate", "expert", "shared", "model.layers.7", re.compile("lora")])
def test_what_a_model_does_not_have_is_an_error_that_lists_what_it_has(part):
    with pytest.raises(ValueError, match="its parts are router, experts, attention, embeddings, norms, rest"):
        freeze(SPARSE["mixtral"](), part)


def test_a_router_without_parameters_is_no_part():
    model = llama(router=partial(Lookup, key="input_ids"))
    with pytest.raises(ValueError, match="no parameter in 'router'"):
        freeze(model, "router")


def test_something_has_to_be_left_to_learn():
    model = llama()
    with pytest.raises(ValueError, match="nothing in this LlamaForCausalLM is left to learn"):
        freeze(model, *PARTS)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="name what to freeze"):
        freeze(model)


@pytest.mark.parametrize("name", ["mixtral", "ours"])
def test_a_balance_loss_on_frozen_routers_is_refused(name, tmp_path):
    model = MODELS[name]()
    freeze(model, "router", verbose=False)
    for sparse in (SparseArguments(), SparseArguments(balance=0, z=1e-3)):
        with pytest.raises(ValueError, match="all routers are frozen"):
            trainer(model, tmp_path, sparse).train()
    for sparse in (SparseArguments(balance=0), SparseArguments(balance=0, losses=[(1e-2, balance)])):
        trainer(model, tmp_path, sparse).train()


def test_training_with_a_frozen_part_goes_on_from_a_checkpoint(tmp_path):
    sparse, saving = SparseArguments(balance=0), {"save_strategy": "steps", "save_steps": 1}
    ends = []
    for folder, stops in (("whole", [3]), ("parts", [2, 3])):
        for stop in stops:
            model = llama()
            freeze(model, "router", verbose=False)
            options = saving | {"max_steps": stop, "lr_scheduler_type": "constant"}
            trainer(model, tmp_path / folder, sparse, **options).train(resume_from_checkpoint=stop != stops[0])
        ends.append(snapshot(model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
