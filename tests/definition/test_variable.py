"""As many experts as a token needs: the formulas, one token and one expert at a time, in fp64."""

import pytest
import torch
from torch import nn

from moeify import MoE
from moeify.experts import Each
from moeify.routers import ReLU, Threshold, TopP
from strategies import agree, doubled, sharpen

T, D, E = 14, 6, 5


def slow_top_p(z, p, max_k):
    total = sum(torch.exp(z_j) for z_j in z)
    s = [torch.exp(z_j) / total for z_j in z]
    gates, reached = {}, 0.0
    for j in sorted(range(E), key=lambda j: -s[j].item()):
        if len(gates) == max_k or reached > p:
            break
        gates[j] = s[j]
        reached += s[j].item()
    return gates


def slow_threshold(z, threshold):
    s = [1 / (1 + torch.exp(-z_j)) for z_j in z]
    best = max(range(E), key=lambda j: s[j].item())
    return {j: s[j] for j in range(E) if s[j].item() > threshold or j == best}


def slow_relu(z):
    return {j: z[j] for j in range(E) if z[j].item() > 0}


@pytest.mark.parametrize(
    ("router", "formula"),
    [
        (TopP(D, E, p=0.4), lambda z: slow_top_p(z, 0.4, E)),
        (TopP(D, E, p=0.8), lambda z: slow_top_p(z, 0.8, E)),
        (TopP(D, E, p=0.9, max_k=2), lambda z: slow_top_p(z, 0.9, 2)),
        (TopP(D, E, p=1.0), lambda z: slow_top_p(z, 1.0, E)),
        (Threshold(D, E), lambda z: slow_threshold(z, 0.5)),
        (Threshold(D, E, threshold=0.9), lambda z: slow_threshold(z, 0.9)),
        (ReLU(D, E), slow_relu),
    ],
)
def test_a_variable_number_of_experts_is_its_formula(router, formula):
    moe = MoE(router, Each([nn.Linear(D, 3, bias=False) for _ in range(E)]))
    sharpen(moe)
    x = torch.randn(T, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow = []
    for t in range(T):
        gates = formula([p["router.weight"][j] @ x64[t] for j in range(E)])
        expert_outputs = [g * (p[f"experts.experts.{j}.weight"] @ x64[t]) for j, g in gates.items()]
        slow.append(sum(expert_outputs, start=0 * x64[t, :3]))
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()])
