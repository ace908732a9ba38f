"""Low-rank experts in the trainer: clusters and types of samples come from the data."""

from functools import partial

import pytest
import torch
from transformers import TrainingArguments

from moeify import Recipe, record, sparsify
from moeify.context import extra_inputs
from moeify.find import linears
from moeify.losses import localized
from moeify.routers import Cluster
from moeify.sparsify import frozen, lora, recipes
from moeify.train import SparseArguments, SparseTrainer, freeze
from tiny_models import causal_lm, tokens


def train(model, folder, column, **sparse):
    ids = tokens(8).tolist()
    data = [{"input_ids": row, "labels": row, column: i % 2} for i, row in enumerate(ids)]
    small = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": [], "use_cpu": True}
    arguments = TrainingArguments(folder, **small, disable_tqdm=True, learning_rate=1e-2)
    SparseTrainer(model, arguments, train_dataset=data, sparse=SparseArguments(balance=0, **sparse)).train()
    return ids, [row[column] for row in data]


def test_of_the_experts_by_cluster_those_of_the_data_learn_and_the_universal_one(tmp_path):
    router = partial(Cluster, clusters=2, temperature=1.0, noise=0.0)
    recipe = Recipe(where=linears("q_proj"), num_experts=5, router=router, experts=lora, shared=frozen)
    model = sparsify(causal_lm("llama"), recipe, verbose=False)
    freeze(model, "base", verbose=False)
    ids, clusters = train(model, tmp_path, "cluster")
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    with extra_inputs(model, cluster=clusters), record(model) as decisions:
        model(torch.tensor(ids))
    used = decisions["model.layers.0.self_attn.q_proj"].counts > 0
    assert torch.equal(layer.experts.lora_B.detach().flatten(1).any(1), used)
    assert used[4]


@pytest.mark.parametrize("delta", [-0.5, 0.5])
def test_the_localized_constraint_reads_the_types_from_the_data(delta, tmp_path):
    model = sparsify(causal_lm("llama"), recipes["loramoe"], verbose=False)
    loss = partial(localized, delta=delta)

    def constraint(ids, types):
        with extra_inputs(model, task_type=types), record(model.eval()) as decisions, torch.no_grad():
            model(torch.tensor(ids))
        return sum(loss(routing).item() for routing in decisions.values())

    before = constraint(tokens(8).tolist(), [0, 1] * 4)
    freeze(model, "base", "experts", verbose=False)
    assert constraint(*train(model, tmp_path, "task_type", losses=[(1.0, loss)])) < before
