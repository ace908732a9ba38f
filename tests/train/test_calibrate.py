"""In calibration every expert reads every real token once, and nothing that the model answers changes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from moeify import MoE, Recipe, record, sparsify
from moeify.context import extra_inputs
from moeify.experts import FFN, Each
from moeify.layers import sparse_layers
from moeify.multihead import MultiHead
from moeify.routers import Capacity, ExpertChoice, Lookup, SharedRouting, Soft, TopK
from moeify.sparsify import fresh
from moeify.train.calibrate import calibrate_all_experts, tokens_per_expert
from tiny_models import DENSE, SPARSE, causal_lm, tokens

D, E = 8, 4
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
ROUTERS = {
    "topk": TopK,
    "capacity": lambda width, count: Capacity(TopK(width, count), factor=0.5),
    "expert_choice": ExpertChoice,
    "shared routing": lambda width, count: SharedRouting(TopK(width, count)),
}


def linears():
    return [nn.Sequential(nn.Linear(D, D), nn.ReLU()) for _ in range(E)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ROUTERS)
def test_each_expert_reads_each_real_token_once(name, padded):
    layer = MoE(ROUTERS[name](D, E), Each(linears()))
    layer.context.mask(MASK if padded else None)
    x, read = torch.randn(2, 8, D), {}
    for expert, module in enumerate(layer.experts.experts):
        module.register_forward_hook(lambda m, args, out, e=expert: read.setdefault(e, []).append(args[0]))
    with torch.no_grad():
        before = layer(x)
        read.clear()
        with calibrate_all_experts(layer):
            during = layer(x)
    assert torch.equal(before, during)
    real = x[MASK.bool()] if padded else x.flatten(0, 1)
    for rows in read.values():
        rows = torch.cat(rows)
        assert torch.equal(rows[rows[:, 0].argsort()], real[real[:, 0].argsort()])
    assert set(read) == set(range(E))


def visits_of(experts, num_experts):
    """Counts the tokens that experts of transformers are called with, expert by expert."""
    visits = torch.zeros(num_experts, dtype=torch.int64)

    def hook(module, args, kwargs, output):
        index = next(t for t in (*args, *kwargs.values()) if not t.is_floating_point())
        visits.add_(index.flatten().bincount(minlength=num_experts))

    experts.register_forward_hook(hook, with_kwargs=True)
    return visits


@pytest.mark.parametrize("name", SPARSE)
def test_experts_of_transformers_read_every_token_once(name):
    model, ids = SPARSE[name](), tokens(2, 8)
    with torch.no_grad():
        before = model(ids).logits
        layers = [layer.experts for layer in sparse_layers(model).values()]
        visits = [visits_of(experts, experts.down_proj.shape[0]) for experts in layers]
        with calibrate_all_experts(model), record(model) as decisions:
            during = model(ids).logits
        assert torch.equal(before, during)
        assert all((seen == 16).all() for seen in visits)
        assert {routing.choices.indices.shape[1] for routing in decisions.values()} == {2}
        model(ids)
    assert all(seen.sum() == 16 * len(seen) + 16 * 2 for seen in visits)


def test_padding_is_no_calibration_data_of_a_native_model():
    model, ids = SPARSE["mixtral"](), tokens(2, 8)
    experts = sparse_layers(model)["model.layers.0.mlp"].experts
    with torch.no_grad(), record(model) as decisions:
        model(ids, attention_mask=MASK)
        routed = decisions["model.layers.0.mlp"].counts
        visits = visits_of(experts, 4)
        model(ids, attention_mask=MASK)
        padding = visits - routed
        visits.zero_()
        with calibrate_all_experts(model):
            model(ids, attention_mask=MASK)
    assert torch.equal(visits - padding, torch.full((4,), 13))


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_our_layers_in_a_model_answer_as_they_did(name):
    model = sparsify(DENSE[name](), Recipe(num_experts=4, experts=fresh), verbose=False)
    ids = tokens(2, 8)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})
    rows = []
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.experts.register_forward_hook(lambda m, args, out: rows.append(args[1]))
    with torch.no_grad():
        before = model(**inputs).logits
        rows.clear()
        with calibrate_all_experts(model):
            assert torch.equal(model(**inputs).logits, before)
    layers = sum(isinstance(layer, MoE) for layer in model.modules())
    assert torch.equal(torch.stack(rows).sum(0), torch.full((4,), 16 * layers))


def test_a_backend_that_was_named_is_back_afterwards():
    layer = MoE(TopK(D, E), FFN(E, D, D), backend="gather")
    with calibrate_all_experts(layer):
        layer(torch.randn(5, D))
    assert layer.backend == "gather"
    assert not layer._forward_hooks
    assert not layer.router._forward_hooks


def test_sub_tokens_and_soft_mixtures_are_calibrated_too():
    rows = []
    for layer in (MultiHead(MoE(TopK(4, E), FFN(E, 4, 8)), D, heads=2), MoE(Soft(D, E), FFN(E, D, 8))):
        moe = next(part for part in layer.modules() if isinstance(part, MoE))
        moe.experts.register_forward_hook(lambda m, args, out: rows.append(args[1]))
        with calibrate_all_experts(layer):
            layer(torch.randn(2, 5, D))
    assert torch.equal(rows[0] + rows[1], torch.full((E,), 2 * 5 * 2))
    assert len(rows) == 3
    assert (rows[2] > 0).all()


def test_a_model_without_experts_cannot_be_calibrated():
    with pytest.raises(ValueError, match="no sparse layer, so it has no experts to calibrate"):
        calibrate_all_experts(causal_lm("llama")).__enter__()
    with pytest.raises(ValueError, match="no sparse layer"):
        tokens_per_expert(causal_lm("llama"), [tokens()])


@pytest.mark.parametrize("name", [*SPARSE, "ours"])
def test_tokens_are_counted_by_expert_over_a_set_without_padding(name):
    model = SPARSE[name]() if name in SPARSE else sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False)
    model.train()
    batches = [{"input_ids": tokens(2, 8, seed), "attention_mask": MASK} for seed in range(3)]
    report = tokens_per_expert(model, batches)
    assert model.training
    assert all(counts.sum() == 3 * 13 * 2 for counts in report.layers.values())
    with calibrate_all_experts(model):
        again = tokens_per_expert(model, batches)
    assert all(torch.equal(again.layers[layer], counts) for layer, counts in report.layers.items())


def test_experts_that_the_data_misses_are_named(capsys):
    router = partial(Lookup, key="task", size=4)
    model = sparsify(causal_lm("llama"), Recipe(num_experts=4, router=router), verbose=False)
    report = tokens_per_expert(model, [{"input_ids": tokens(2, 8), "task": torch.tensor([1, 1])}])
    chosen = model.model.layers[0].mlp.router.table[1].item()
    assert report.missed()["model.layers.0.mlp"] == [e for e in range(4) if e != chosen]
    assert report.missed(at_least=17)["model.layers.0.mlp"] == [0, 1, 2, 3]
    report.show()
    assert "model.layers.0.mlp" in capsys.readouterr().out
    with extra_inputs(model, task=[0, 3]):
        assert tokens_per_expert(model, [tokens(2, 8)]).layers["model.layers.0.mlp"].tolist().count(8) == 2
