"""Experts in a latent space against LatentMoE's formula, token by token, in fp64, and Nemotron-H's block."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

from moeify import MoE, backends
from moeify.backends import compose
from moeify.experts import FFN, Each, Latent, Plain
from moeify.find import DenseFFN
from moeify.flops import count
from moeify.kernels.stacked import relu2
from moeify.routers import Soft, TopK, sigmoid
from moeify.sparsify import fresh, in_latent_space
from strategies import agree, doubled, sharpen

T, D, L, E, K = 9, 8, 3, 4, 2


def test_tokens_are_projected_down_before_the_experts_and_up_after_their_sum():
    moe = MoE(TopK(D, E, k=K), Latent(Each([nn.Linear(L, L) for _ in range(E)]), D, L))
    sharpen(moe)
    x = torch.randn(T, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow = []
    for token in x64:
        scores = torch.softmax(p["router.weight"] @ token, 0)
        chosen = sorted(range(E), key=lambda e: -scores[e].item())[:K]
        z = p["experts.down.weight"] @ token
        inner = [p[f"experts.experts.experts.{e}.weight"] @ z + p[f"experts.experts.experts.{e}.bias"] for e in chosen]
        total = sum(scores[e] for e in chosen)
        slow.append(p["experts.up.weight"] @ sum(scores[e] / total * y for e, y in zip(chosen, inner, strict=True)))
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()])


@pytest.mark.parametrize("router", [TopK(D, E, k=3), Soft(D, E, slots=2)])
def test_projecting_once_per_token_changes_nothing(router):
    layer = MoE(router, Latent(FFN(E, L, 6), D, L)).double()
    x = torch.randn(2, 5, D, dtype=torch.float64)
    routing = layer.router(x, layer.context)
    assert backends.choose(x, routing, layer.experts) == "latent"
    torch.testing.assert_close(layer(x), compose(x, routing, layer.experts))
    seen = []
    layer.experts.down.register_forward_hook(lambda module, args, output: seen.append(output.numel() // L))
    layer(x)
    assert seen == [10]


def test_hooks_of_the_experts_run():
    layer = MoE(TopK(D, E), Latent(FFN(E, L, 6), D, L))
    called = []
    layer.experts.register_forward_hook(lambda *call: called.append(call))
    layer(torch.randn(2, 5, D))
    assert len(called) == 1


def test_the_projections_are_counted_once_per_token():
    layer = MoE(TopK(D, E, k=3), Latent(FFN(E, L, 6), D, L))
    expert = 3 * L * 6
    counted = count(layer)
    assert counted.flops == 2 * (E * D + 2 * D * L + 3 * expert)
    assert counted.active_parameters == E * D + 2 * D * L + 3 * expert
    assert counted.dense_flops == 2 * (E * D + 2 * D * L + E * expert)


def test_a_recipe_makes_experts_of_a_narrower_network():
    dense = DenseFFN([nn.Linear(D, 12), nn.Linear(D, 12)], nn.Linear(12, D), Plain(torch.tanh))
    with pytest.raises(ValueError, match="a width of 8 cannot be divided by factor=3"):
        in_latent_space(dense, E, factor=3)
    with pytest.raises(ValueError, match="outputs as wide as its inputs"):
        in_latent_space(nn.Linear(D, D), E)
    dense = DenseFFN([nn.Linear(D, 12)], nn.Linear(12, D), Plain(torch.tanh))
    experts = in_latent_space(dense, E, factor=2, experts=lambda dense, e: fresh(dense, e, granularity=3))
    assert (experts.down.weight.shape, experts.experts.up_proj.shape) == ((4, D), (E, 4, 4))


def test_nemotron_h_is_latent_experts_beside_a_shared_one():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "nemotron_h", hidden_size=D, n_routed_experts=E, num_experts_per_tok=K, moe_intermediate_size=6,
        moe_shared_expert_intermediate_size=6, moe_latent_size=L, routed_scaling_factor=2.5,
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = NemotronHMoE(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    router = TopK(D, E, k=K, score=sigmoid, selection_bias=True, scale=2.5)
    experts = Latent(FFN(E, L, 6, activation=Plain(relu2)), D, L)
    ours = MoE(router, experts, copy.deepcopy(theirs.shared_experts))
    pairs = {
        router.weight: theirs.gate.weight,
        experts.down.weight: theirs.fc1_latent_proj.weight,
        experts.up.weight: theirs.fc2_latent_proj.weight,
        experts.experts.up_proj: theirs.experts.up_proj,
        experts.experts.down_proj: theirs.experts.down_proj,
    } | dict(zip(ours.shared.parameters(), theirs.shared_experts.parameters(), strict=True))
    assert len(pairs) == len(list(ours.parameters())) == len(list(theirs.parameters()))
    with torch.no_grad():
        for mine, other in pairs.items():
            mine.copy_(other)
    results = []
    for block in (ours, theirs):
        x = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = block(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad))
    for mine, other in [*zip(*results, strict=True), *((m.grad, o.grad) for m, o in pairs.items())]:
        assert (mine - other).abs().max() <= 1e-6 * other.abs().max()
