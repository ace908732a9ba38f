"""GShard's algorithm 1, one token at a time, in fp64."""

import pytest
import torch
from torch import nn

from moeify import MoE
from moeify.experts import Each
from moeify.routers import GShard
from strategies import agree, doubled, route, sharpen

T, D, E = 14, 6, 5


def slow_gshard(x, weight, draw, threshold):
    z = [weight[j] @ x for j in range(E)]
    total = sum(torch.exp(z_j) for z_j in z)
    p = [torch.exp(z_j) / total for z_j in z]
    first, second = sorted(range(E), key=lambda j: -p[j].item())[:2]
    g1, g2 = p[first] / (p[first] + p[second]), p[second] / (p[first] + p[second])  # before anything is dropped
    return {first: g1} | ({second: g2} if draw < min(1.0, g2.item() / threshold) else {})


@pytest.mark.parametrize("threshold", [0.2, 0.5])
@pytest.mark.parametrize("mode", ["training", "evaluation", "random evaluation"])
def test_gshard_is_its_algorithm(mode, threshold):
    router = GShard(D, E, threshold=threshold, eval_random=mode == "random evaluation")
    moe = MoE(router, Each([nn.Linear(D, 3, bias=False) for _ in range(E)])).train(mode == "training")
    sharpen(moe)
    x = torch.randn(T, D, requires_grad=True)
    torch.manual_seed(3)
    y = moe(x)
    torch.manual_seed(3)
    draws = torch.zeros(T) if mode == "evaluation" else torch.rand(T)

    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow = [
        sum(
            g * (p[f"experts.experts.{j}.weight"] @ x64[t])
            for j, g in slow_gshard(x64[t], p["router.weight"], draws[t].item(), threshold).items()
        )
        for t in range(T)
    ]
    agree(y, [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()])


@pytest.mark.parametrize(("second", "threshold"), [(0.1, 0.2), (0.3, 0.5), (0.25, 0.2), (0.5, 1.0)])
def test_the_second_expert_is_used_with_probability_weight_over_threshold(second, threshold):
    router = GShard(1, 2, threshold=threshold)
    router.weight.data = torch.tensor([[1 - second], [second]]).log()  # softmax gives the two weights
    routing = route(router, torch.ones(20000, 1))
    assert routing.counts[0] == 20000
    assert routing.counts[1].item() / 20000 == pytest.approx(min(1.0, second / threshold), abs=0.015)
    torch.testing.assert_close(routing.weight[0].item(), 1 - second)
