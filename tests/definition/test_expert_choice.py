"""Expert choice against equations 1 to 3, one expert at a time, in fp64."""

from math import ceil

import pytest
import torch
from torch import nn

from moeify import MoE
from moeify.experts import Each
from moeify.routers import ExpertChoice
from strategies import agree, doubled, sharpen

B, N, D, E = 3, 7, 6, 4


def slow_expert_choice(tokens, weight, factor):
    """Weights (N, E) with which the tokens of one group reach the experts."""
    scores = []
    for x in tokens:
        z = [weight[j] @ x for j in range(E)]
        total = sum(torch.exp(z_j) for z_j in z)
        scores.append([torch.exp(z_j) / total for z_j in z])
    slots = ceil(factor * len(tokens) / E)
    taken = [sorted(range(len(tokens)), key=lambda t: -scores[t][j].item())[:slots] for j in range(E)]
    return [{j: scores[t][j] for j in range(E) if t in taken[j]} for t in range(len(tokens))]


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("per", ["sequence", "batch"])
def test_expert_choice_is_its_equations(per, factor):
    moe = MoE(ExpertChoice(D, E, factor=factor, per=per), Each([nn.Linear(D, 3, bias=False) for _ in range(E)]))
    sharpen(moe)
    x = torch.randn(B, N, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow = []
    for tokens in x64 if per == "sequence" else [x64.flatten(0, 1)]:
        for token, gates in zip(tokens, slow_expert_choice(tokens, p["router.weight"], factor), strict=True):
            expert_outputs = [g * (p[f"experts.experts.{j}.weight"] @ token) for j, g in gates.items()]
            slow.append(sum(expert_outputs, start=0 * token[:3]))
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow).view(B, N, 3), [x64, *p.values()])
