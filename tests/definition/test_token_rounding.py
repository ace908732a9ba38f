"""Token rounding against algorithm 4 of SonicMoE, one expert at a time, in fp64."""

from math import ceil, floor

import pytest
import torch
from torch import nn

from moeify import MoE
from moeify.experts import Each
from moeify.routers import TokenRounding, TopK, sigmoid
from moeify.routers.token_rounding import balanced, down, nearest, up
from strategies import agree, doubled, sharpen

B, N, D, E, K = 3, 7, 6, 4, 2
SCORES = {"softmax": lambda z: z.softmax(0), "sigmoid": torch.sigmoid}


def slow_rounding(frequencies, tile, rounding):
    """Multiples of the tile: NR-f, Balance-f with the error that it carries on, and the two that only drop or pad."""
    found, error = [], 0
    for f in frequencies:
        low, high = tile * floor(f / tile), tile * ceil(f / tile)
        pads = {
            "nearest": high - f < f - low,
            "up": True,
            "down": False,
            "balanced": abs(high - f + error) < abs(low - f + error),
        }[rounding]
        found.append(high if pads else low)
        error += found[-1] - f
    return found


def slow_token_rounding(tokens, weight, score, tile, rounding):
    """Weights with which every token reaches the experts, and the number of rows of every expert."""
    s = torch.stack([score(weight @ x) for x in tokens])
    chosen = [sorted(range(E), key=lambda e, t=t: -s[t, e].item())[:K] for t in range(len(tokens))]
    gates = [{e: s[t, e] / sum(s[t, i] for i in chosen[t]) for e in chosen[t]} for t in range(len(tokens))]
    frequencies = [sum(e in choice for choice in chosen) for e in range(E)]
    rounded = slow_rounding(frequencies, tile, rounding)
    reached = [{} for _ in tokens]
    for e in range(E):
        preferred = [gates[t][e].item() if e in gates[t] else s[t, e].item() - 1 for t in range(len(tokens))]
        for t in sorted(range(len(tokens)), key=lambda t: -preferred[t])[: rounded[e]]:
            reached[t][e] = gates[t].get(e, s[t, e])
    return reached, rounded


@pytest.mark.parametrize("rounding", [nearest, up, down, balanced], ids=lambda rounding: rounding.__name__)
@pytest.mark.parametrize("tile", [1, 3, 4])
@pytest.mark.parametrize("score", SCORES)
def test_token_rounding_is_its_algorithm(score, tile, rounding):
    inner = TopK(D, E, k=K, **({"score": sigmoid} if score == "sigmoid" else {}))
    moe = MoE(TokenRounding(inner, tile=tile, rounding=rounding), Each([nn.Linear(D, 3, bias=False) for _ in range(E)]))
    sharpen(moe)
    x = torch.randn(B, N, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    tokens = x64.flatten(0, 1)
    reached, counts = slow_token_rounding(tokens, p["router.router.weight"], SCORES[score], tile, rounding.__name__)
    slow = [
        sum((g * (p[f"experts.experts.{e}.weight"] @ x) for e, g in gates.items()), start=0 * x[:3])
        for x, gates in zip(tokens, reached, strict=True)
    ]
    assert moe.router(x, moe.context).counts.tolist() == counts
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow).view(B, N, 3), [x64, *p.values()])
