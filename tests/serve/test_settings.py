"""Serving with another capacity, k or priority than in training."""

from functools import partial

import pytest
import torch
from torch import nn

from moeify import MoE, Recipe, record, sparsify
from moeify.experts import FFN
from moeify.routers import Capacity, ExpertChoice, TopK
from moeify.serve import serve_with
from moeify.sparsify import fresh, recipes
from plain_models import sparse_layers
from tiny_models import DENSE, causal_lm

D, E = 8, 4


def sparse(make) -> nn.Module:
    return nn.Sequential(*(MoE(make(), FFN(E, D, 6)) for _ in range(2))).eval()


def decisions(model, x):
    with record(model) as found:
        model(x)
    return list(found.values())


def test_every_router_serves_with_what_was_asked_for():
    model, x = sparse(lambda: Capacity(TopK(D, E), factor=1.0, eval_factor=4.0)), torch.randn(5, 8, D)
    assert [d.counts.sum().item() for d in decisions(model, x)] == [80, 80]
    assert serve_with(model, capacity=0.5, priority="batch", k=1) is model
    for decision in decisions(model, x):
        assert decision.assigned.sum() == 40
        assert decision.counts.max() <= 5  # ceil(0.5 · 1 · 40 / 4)
    model.train()
    assert decisions(model, x)[0].counts.max() > 5


def test_batch_priority_keeps_the_most_confident_tokens():
    model, x = sparse(lambda: Capacity(TopK(D, E, k=1, normalize=False), eval_factor=4.0)), torch.randn(1, 40, D)
    whole = decisions(model, x)[0]
    kept = decisions(serve_with(model, capacity=0.5, priority="batch"), x)[0]
    for e in range(E):
        every, served = whole.weight[whole.expert == e], kept.weight[kept.expert == e]
        assert torch.equal(served.sort(descending=True).values, every.sort(descending=True).values[: len(served)])


def test_a_v_moe_serves_with_batch_priority_and_a_decoder_does_not():
    model = sparsify(DENSE["bert"](), recipes["vmoe"], verbose=False)
    serve_with(model, priority="batch")
    assert {layer.router.priority for layer in sparse_layers(model).values()} == {"batch"}
    decoder = sparsify(
        causal_lm("llama"), Recipe(num_experts=4, router=recipes["switch"].router, experts=fresh), verbose=False
    )
    with pytest.raises(ValueError, match=r"is in a decoder, and priority='batch' decides by looking at later tokens"):
        serve_with(decoder, capacity=0.5, priority="batch")
    assert {layer.router.eval_factor for layer in sparse_layers(decoder).values()} == {2.0}


@pytest.mark.parametrize(
    ("router", "settings", "words"),
    [
        (partial(TopK, D, E), {}, "nothing to set"),
        (partial(TopK, D, E), {"capacity": 0.5}, "no router of this Sequential has a capacity"),
        (partial(ExpertChoice, D, E), {"k": 1}, "has a number of experts per token to set"),
        (partial(TopK, D, E), {"k": 5}, "k=5 experts per token out of 4; choose 1 <= k <= 4"),
        (lambda: Capacity(TopK(D, E)), {"capacity": 0.0}, "drops every token"),
    ],
)
def test_what_cannot_be_served_is_refused(router, settings, words):
    with pytest.raises(ValueError, match=words):
        serve_with(sparse(router), **settings)
