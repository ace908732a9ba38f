"""Sinkhorn routing against its iteration, written with loops, in fp64."""

from math import exp

import pytest
import torch
from torch import nn

from moeify import MoE
from moeify.experts import Each
from moeify.routers import Sinkhorn
from moeify.routers.sinkhorn import plan
from strategies import agree, doubled, sharpen

T, D, E = 16, 6, 4


def slow_plan(z, turns=2000):
    """d0 = 1/T / (cost · d1), d1 = 1/E / (costᵀ · d0), by turns."""
    tokens, experts = len(z), len(z[0])
    cost = [[exp(z_j) for z_j in row] for row in z]
    d0, d1 = [1.0] * tokens, [1.0] * experts
    for _ in range(turns):
        d0 = [1 / tokens / sum(cost[t][j] * d1[j] for j in range(experts)) for t in range(tokens)]
        d1 = [1 / experts / sum(cost[t][j] * d0[t] for t in range(tokens)) for j in range(experts)]
    return [[d0[t] * cost[t][j] * d1[j] for j in range(experts)] for t in range(tokens)]


def test_the_plan_is_where_the_iteration_ends():
    z = torch.randn(T, E)
    torch.testing.assert_close(plan(z, 1e-6), torch.tensor(slow_plan(z.tolist())), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_experts_come_from_the_plan_and_weights_from_the_router(training, k):
    moe = MoE(Sinkhorn(D, E, k=k), Each([nn.Linear(D, 3, bias=False) for _ in range(E)])).train(training)
    sharpen(moe)
    x = torch.randn(T, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    z = [[p["router.weight"][j] @ x64[t] for j in range(E)] for t in range(T)]
    values = [[z_j.item() for z_j in row] for row in z]
    choice = slow_plan(values) if training else values
    slow = []
    for t in range(T):
        chosen = sorted(range(E), key=lambda j: -choice[t][j])[:k]
        total = sum(torch.exp(z_j) for z_j in z[t])
        s = [1 / (1 + torch.exp(-z_j)) if k == 1 else torch.exp(z_j) / total for z_j in z[t]]
        slow.append(sum(s[j] * (p[f"experts.experts.{j}.weight"] @ x64[t]) for j in chosen))
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()])
