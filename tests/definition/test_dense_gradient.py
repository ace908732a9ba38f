"""DenseMixer's router gradient against a straight-through loop over all experts; nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from moeify import MoE, record
from moeify.experts import FFN
from moeify.routers import Capacity, ExpertChoice, TopK, sigmoid
from moeify.train import dense_router_gradient
from tiny_models import deepseek_v3, gpt_oss, mixtral, olmoe, qwen3_moe, tokens

D, E, K = 8, 6, 2
ROUTERS = {
    "normalised": lambda: TopK(D, E, k=K, init_std=0.5),
    "as they are": lambda: TopK(D, E, k=K, normalize=False, init_std=0.5),
    "sigmoid, scaled": lambda: TopK(D, E, k=K, score=sigmoid, scale=2.5, selection_bias=True, init_std=0.5),
}


def straight_through(moe, x):
    """The output of the chosen experts, and the gradient of all of them: the formula of yaof20/DenseMixer."""
    router, experts = moe.router, moe.experts
    tokens = x.flatten(0, -2)
    scores = router.score(tokens @ router.weight.T)
    chosen = moe.router(x, moe.context).choices
    sums = scores.gather(-1, chosen.indices).sum(-1)
    sparse, dense = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for e in range(router.num_experts):
        is_chosen = (chosen.indices == e).any(-1)
        gate, up = (tokens @ experts.gate_up_proj[e].T).chunk(2, -1)
        output = (nn.functional.silu(gate) * up) @ experts.down_proj[e].T
        output = torch.where(is_chosen[:, None], output, output.detach())  # experts learn from their own tokens only
        norm = torch.where(is_chosen, sums, sums.detach()) if router.normalize else torch.ones_like(sums)
        weight = (router.scale * scores[:, e] / norm)[:, None]
        dense = dense + weight * output
        sparse = sparse + torch.where(is_chosen[:, None], weight * output, 0.0)
    return (sparse.detach() + dense - dense.detach()).view(x.shape)


def gradients(output, x, module, upstream):
    return torch.autograd.grad(output, [x, *module.parameters()], upstream)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_router_learns_from_all_experts_and_nothing_else_changes(name):
    torch.manual_seed(0)
    moe = MoE(ROUTERS[name](), FFN(E, D, 12)).double()
    if moe.router.selection_bias is not None:
        moe.router.selection_bias.copy_(torch.randn(E))
    x, upstream = torch.randn(2, 10, D).double().requires_grad_(), torch.randn(2, 10, D).double()
    usual = moe(x)
    with dense_router_gradient(moe):
        found = moe(x)
    expected = straight_through(moe, x)
    assert torch.allclose(found, usual, atol=1e-7)
    ours, theirs, before = (gradients(y, x, moe, upstream) for y in (found, expected, usual))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    _, router, *experts = zip(ours, before, strict=True)
    assert not torch.allclose(*router, atol=1e-6)
    assert all(torch.allclose(*pair, atol=1e-6) for pair in experts)
    assert torch.equal(moe(x), usual)


@pytest.mark.parametrize("build", [mixtral, olmoe, qwen3_moe, deepseek_v3, gpt_oss])
def test_models_of_transformers_answer_as_before_and_all_their_routers_learn_otherwise(build):
    model, ids = build().train(), tokens(3)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    found = []
    for dense in (False, True):
        model.zero_grad()
        if dense:
            with dense_router_gradient(model), record(model) as decisions:
                output = model(input_ids=ids, labels=ids, attention_mask=mask)
        else:
            output = model(input_ids=ids, labels=ids, attention_mask=mask)
        output.loss.backward()
        found.append((output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    (logits, usual), (same, dense) = found
    assert torch.equal(logits, same)
    assert all(len(routing.choices.indices) == mask.sum() for routing in decisions.values())
    routers = [n for n in usual if n.endswith(("gate.weight", "router.weight"))]
    assert len(routers) == len(decisions)
    assert not any(torch.allclose(usual[n], dense[n], rtol=1e-3) for n in routers)
    last = [n for n in usual if "lm_head" in n or "layers.2.mlp.experts" in n]
    assert all(torch.equal(usual[n], dense[n]) for n in last)


def test_the_gradient_is_that_of_a_loop_in_a_model_of_transformers():
    model, ids = olmoe(norm_topk_prob=True).train(), tokens(2)
    block = model.model.layers[1].mlp
    kept = []
    block.register_forward_hook(lambda module, args, output: kept.append((args[0], output)))
    with dense_router_gradient(model):
        loss = model(input_ids=ids, labels=ids).loss
    x, output = kept[0]
    (upstream,) = torch.autograd.grad(loss, output, retain_graph=True)
    (found,) = torch.autograd.grad(loss, block.gate.weight)
    ours = MoE(TopK(32, 8), FFN(8, 32, 16))
    ours.router.weight, ours.experts.gate_up_proj = block.gate.weight, block.experts.gate_up_proj
    ours.experts.down_proj = block.experts.down_proj
    (expected,) = torch.autograd.grad(straight_through(ours, x), block.gate.weight, upstream.view_as(x))
    assert torch.allclose(found, expected, atol=1e-6)


def test_nothing_more_runs_in_evaluation_and_after():
    moe = MoE(TopK(D, E), FFN(E, D, 12))
    calls = []
    moe.experts.register_forward_hook(lambda *args: calls.append(1))
    x = torch.randn(4, D)
    with dense_router_gradient(moe):
        moe.eval()(x)
        with torch.no_grad():
            moe.train()(x)
        assert len(calls) == 2
        moe(x)
        assert len(calls) == 4
    moe(x)
    assert len(calls) == 5


def test_what_has_no_scores_or_choices_is_refused():
    with pytest.raises(ValueError, match="no sparse layer"), dense_router_gradient(nn.Linear(2, 2)):
        pass
    moe = MoE(ExpertChoice(D, E), FFN(E, D, 12))
    with dense_router_gradient(moe), pytest.raises(ValueError, match="use a token-choice router"):
        moe(torch.randn(2, 12, D))
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "num_experts": 4}
    switch = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**sizes))
    with pytest.raises(ValueError, match="does not call its experts with chosen tokens"), dense_router_gradient(switch):
        pass
    limited = MoE(Capacity(TopK(D, E), factor=0.5), FFN(E, D, 12))
    with dense_router_gradient(limited):
        limited(torch.randn(2, 12, D)).sum().backward()
    assert limited.router.router.weight.grad.isfinite().all()
