"""Expert threshold against its definition, and its cut-offs against expert choice."""

import pytest
import torch
from torch import nn

from moeify import MoE
from moeify.balance import CutOff, control
from moeify.experts import Each
from moeify.routers import ExpertThreshold
from strategies import agree, doubled, route, sharpen

T, D, E = 40, 6, 4


def layer() -> MoE:
    moe = MoE(ExpertThreshold(D, E), Each([nn.Linear(D, 3, bias=False) for _ in range(E)]))
    sharpen(moe)
    return moe


def logits(router: ExpertThreshold, x: torch.Tensor) -> list[list[float]]:
    return (x @ router.weight.T).tolist()


def step(moe: MoE, controller, *batches: torch.Tensor) -> None:
    for x in batches:
        moe(x)
    controller.step()


def test_a_token_goes_to_every_expert_whose_cut_off_it_reaches():
    moe = layer()
    cut_off = [-0.8, 0.0, 0.5, 3.0]
    moe.router.selection_bias.copy_(-torch.tensor(cut_off))
    x = torch.randn(T, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    slow = []
    for token in x64:
        z = [w @ token for w in p["router.weight"]]
        chosen = [j for j in range(E) if z[j] >= cut_off[j]]
        slow.append(
            sum(
                (1 / (1 + torch.exp(-z[j])) * (p[f"experts.experts.{j}.weight"] @ token) for j in chosen),
                start=0 * token[:3],
            )
        )
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()])


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_after_a_step_an_expert_takes_what_expert_choice_would_take(factor):
    moe, x = layer(), torch.randn(T, D)
    step(moe, control(moe, torch.optim.SGD(moe.parameters()), CutOff(factor)), x)
    z, routing = logits(moe.router, x), route(moe.router, x)
    taken = round(factor * T / E)
    for j in range(E):
        expected = sorted(sorted(range(T), key=lambda t, j=j: -z[t][j])[:taken])
        assert routing.source[routing.expert == j].tolist() == expected


def test_cut_offs_follow_the_batches_slowly():
    moe = layer()
    controller = control(moe, torch.optim.SGD(moe.parameters()), CutOff(1.0, ema=0.9))
    mean = [0.0] * E
    for n in range(1, 4):
        batches = torch.randn(2, T, D)
        one, other = (logits(moe.router, x) for x in batches)
        cut_off = [[sorted((row[j] for row in z), reverse=True)[T // E - 1] for z in (one, other)] for j in range(E)]
        mean = [0.9 * m + 0.1 * sum(pair) / 2 for m, pair in zip(mean, cut_off, strict=True)]
        step(moe, controller, *batches)
        assert moe.router.selection_bias.tolist() == pytest.approx([-m / (1 - 0.9**n) for m in mean], abs=1e-5)


def test_a_decision_depends_on_its_token_alone():
    moe, x = layer(), torch.randn(1, 12, D)
    y = moe(x)
    assert torch.allclose(moe(torch.cat([x[:, :6], torch.randn(1, 6, D)], dim=1))[:, :6], y[:, :6])
    assert moe.router.causal


def test_more_experts_than_there_are_cannot_be_wanted():
    moe = layer()
    control(moe, torch.optim.SGD(moe.parameters()), CutOff(5.0))
    with pytest.raises(ValueError, match="choose 0 < factor <= E"):
        moe(torch.randn(T, D))
