"""What activation checkpointing repeats goes to the experts that it went to first."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moeify.context import recomputing
from moeify.routers import Soft, TopK
from moeify.routers.shared_routing import shared_routing
from moeify.sparsify import Recipe, fresh, sparsify
from moeify.train import keep_decisions
from moeify.train.activation_checkpointing import enable
from tiny_models import VOCABULARY, causal_lm, mixtral


class Shaky(nn.Module):
    """A linear router whose input is another one when its forward pass is repeated."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.chosen = []

    def forward(self, x):
        noise = torch.linspace(-3, 3, x.numel()).view_as(x) if recomputing() else 0.0
        values, index = ((x + noise) @ self.weight.T).softmax(-1).topk(2)
        best = (x + noise).argmax(-1, keepdim=True).expand_as(index)
        self.chosen.append(torch.cat([index, best, (x + noise).argsort(-1)], -1))
        return values


def test_a_router_whose_input_changes_between_the_passes_chooses_as_it_first_did():
    layer, x = Shaky(), torch.randn(20, 8, requires_grad=True)
    for context_fn, keeps in [(keep_decisions, True), (None, False)]:
        layer.chosen = []
        options = {} if context_fn is None else {"context_fn": context_fn}
        checkpoint(layer, x, use_reentrant=False, early_stop=False, **options).square().sum().backward()
        first, second = layer.chosen
        assert torch.equal(first, second) == keeps


def test_values_chosen_and_then_changed_in_place_keep_their_gradient():
    def route(x, weight):
        values, _ = (x @ weight.T).softmax(-1).topk(2)
        values /= values.sum(-1, keepdim=True)
        return values.square().sum()

    x, weight = torch.randn(9, 8), torch.randn(6, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(route(x, weight), weight)
    kept = checkpoint(route, x, weight, use_reentrant=False, context_fn=keep_decisions)
    assert torch.equal(torch.autograd.grad(kept, weight)[0], expected)


@pytest.mark.parametrize("build", [mixtral, lambda: sparsify(causal_lm("llama"), Recipe(), verbose=False)])
def test_a_model_has_the_same_gradients_with_and_without_checkpointing(build):
    plain = build().train()
    checked = copy.deepcopy(plain)
    enable(checked)
    ids = torch.randint(3, VOCABULARY, (2, 10))
    for model in (plain, checked):
        model(input_ids=ids, labels=ids).loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), checked.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7), name


LEFT, RIGHT = torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor([[1, 1, 1, 1, 0, 0]])


def two_passes(model, masks=(LEFT, RIGHT)):
    """The gradients of a loss of two forward passes with a mask each."""
    ids = torch.arange(12).view(2, 6)
    model.zero_grad()
    logits = [model(input_ids=ids[i : i + 1], attention_mask=mask).logits for i, mask in enumerate(masks)]
    (logits[0].square().mean() - logits[1].square().mean()).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("router", [TopK, shared_routing, Soft])
def test_two_forward_passes_before_one_backward_pass_keep_a_mask_each(router):
    recipe = Recipe(num_experts=4, router=router, experts=fresh)
    plain = sparsify(causal_lm("llama"), recipe, verbose=False, allow_noncausal=True).train()
    checked = copy.deepcopy(plain)
    enable(checked)
    for a, b in zip(two_passes(plain), two_passes(checked), strict=True):
        torch.testing.assert_close(a, b)


def test_passes_that_nothing_tells_apart_are_an_error():
    model = sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(RuntimeError, match=r"called several times.*context_fn.*keep_decisions"):
        two_passes(model)


def test_one_pass_after_the_other_needs_no_telling_apart():
    plain = sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False).train()
    checked = copy.deepcopy(plain)
    checked.gradient_checkpointing_enable({"use_reentrant": False})
    for mask in (LEFT, RIGHT, LEFT):
        for model in (plain, checked):
            model(input_ids=torch.arange(6).view(1, 6), attention_mask=mask).logits.square().mean().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), checked.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_failed_is_none_that_could_be_repeated(error):
    model = sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def fail(*args):
        raise error

    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(input_ids=torch.arange(6).view(1, 6), attention_mask=LEFT)
    handle.remove()
    model(input_ids=torch.arange(6).view(1, 6), attention_mask=RIGHT).logits.square().mean().backward()


def test_a_layer_that_chooses_more_often_when_it_is_repeated_is_an_error():
    def layer(x):
        for _ in range(2 if recomputing() else 1):
            x = x * x.topk(2).values.sum()
        return x

    x = torch.randn(5, requires_grad=True)
    out = checkpoint(layer, x, use_reentrant=False, context_fn=keep_decisions, early_stop=False)
    with pytest.raises(RuntimeError, match="makes other choices when it is repeated"):
        out.sum().backward()


def test_reentrant_checkpointing_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="use_reentrant=False"):
        enable(mixtral(), {"use_reentrant": True})
