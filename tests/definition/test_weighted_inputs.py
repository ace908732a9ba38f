"""Weights on what experts read against Llama 4's formula, token by token, in fp64."""

import pytest
import torch
from torch import nn

from moeify import MoE
from moeify.experts import Each
from moeify.routers import MoLE, Soft, TopK, WeightedInputs, sigmoid
from strategies import agree, doubled, sharpen

T, D, E = 9, 6, 4


@pytest.mark.parametrize("k", [1, 2])
def test_an_expert_reads_its_token_times_the_sigmoid_of_its_logit(k):
    router = WeightedInputs(TopK(D, E, k=k, score=sigmoid, normalize=False))
    moe = MoE(router, Each([nn.Sequential(nn.Linear(D, 5), nn.Tanh()) for _ in range(E)]))
    sharpen(moe)
    x = torch.randn(T, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow = []
    for token in x64:
        logits = p["router.router.weight"] @ token
        best = sorted(range(E), key=lambda e: -logits[e].item())[:k]
        read = {e: token / (1 + torch.exp(-logits[e])) for e in best}
        slow.append(
            sum(
                torch.tanh(p[f"experts.experts.{e}.0.weight"] @ read[e] + p[f"experts.experts.{e}.0.bias"])
                for e in best
            )
        )
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()])


@pytest.mark.parametrize("router", [Soft(D, E), MoLE(D, E)])
def test_a_router_without_a_weight_before_its_experts_run_is_refused(router):
    moe = MoE(WeightedInputs(router), Each([nn.Linear(D, D) for _ in range(E)]))
    with pytest.raises(ValueError, match="no weight can multiply what experts read"):
        moe(torch.randn(2, 3, D))
