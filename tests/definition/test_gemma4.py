"""Gemma 4's normalised router input and scales of experts, and Laguna's capped scores, against fp64 formulas."""

import math

import pytest
import torch

from moeify.routers import CappedSigmoid, ExpertScale, MultiGate, NormalizedInput, TopK
from strategies import agree, doubled, route, sharpen

T, D, E = 9, 6, 4


@pytest.mark.parametrize("k", [2, 3])
def test_tokens_are_read_at_equal_lengths_and_experts_scaled(k):
    router = ExpertScale(NormalizedInput(TopK(D, E, k=k), D), E)
    sharpen(router)
    with torch.no_grad():
        router.router.gain.normal_(3.0)
        router.scale.normal_()
    x = torch.randn(T, D, requires_grad=True)
    p, x64 = doubled(router), x.detach().double().requires_grad_()
    slow = []
    for token in x64:
        read = token / torch.sqrt((token * token).mean() + 1e-6) * p["router.gain"] / math.sqrt(D)
        e = torch.exp(p["router.router.weight"] @ read)
        best = sorted(range(E), key=lambda j: -e[j].item())[:k]
        zero = torch.zeros((), dtype=torch.float64)
        total = sum(e[j] for j in best)
        slow.append(torch.stack([p["scale"][j] * e[j] / total if j in best else zero for j in range(E)]))
    decision = route(router, x)
    agree(decision.weight_table(), [x, *router.parameters()], torch.stack(slow), [x64, *p.values()])
    torch.testing.assert_close(
        decision.choices.weights, torch.stack(slow).float().gather(1, decision.choices.indices), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("router", [MultiGate(D, E, gates=2)])
def test_weights_of_several_gates_are_refused(router):
    with pytest.raises(ValueError, match="no scale of experts can multiply it"):
        route(ExpertScale(router, E), torch.randn(T, D))


def test_capped_scores_are_their_formula():
    z = torch.randn(T, E).mul(5).requires_grad_()
    slow = 1 / (1 + torch.exp(-2.5 * torch.tanh(z.double() / 2.5)))
    agree(CappedSigmoid(2.5)(z), [z], slow, [z], rtol=1e-5)
    with pytest.raises(ValueError, match="score=sigmoid for none"):
        CappedSigmoid(0)
    assert "capped_sigmoid(2.5)" in repr(TopK(D, E, score=CappedSigmoid(2.5)))
