"""BASE's balanced assignment against the best of all even assignments, and its layer token by token, in fp64."""

from itertools import permutations

import pytest
import torch
from torch import nn

from moeify import MoE
from moeify.experts import Each
from moeify.routers import BalancedAssignment
from moeify.routers.balanced_assignment import assign_evenly
from strategies import agree, doubled, route, sharpen

T, D, E = 6, 5, 3


def best_even_sum(scores):
    """The largest sum of scores over all assignments of T / E tokens to every expert."""
    places = [e for e in range(E) for _ in range(T // E)]
    return max(sum(scores[t][e].item() for t, e in enumerate(order)) for order in set(permutations(places)))


@pytest.mark.parametrize("seed", range(5))
def test_the_sum_of_scores_is_the_largest_that_is_even(seed):
    torch.manual_seed(seed)
    scores = torch.randn(T, E)
    expert = assign_evenly(scores, precision=1e-4)
    assert expert.bincount(minlength=E).tolist() == [T // E] * E
    assert scores.gather(1, expert.unsqueeze(1)).sum().item() == pytest.approx(best_even_sum(scores), abs=1e-2)


def test_the_authors_precision_loses_little():
    scores = torch.randn(200, 8)
    sums = [scores.gather(1, assign_evenly(scores, p).unsqueeze(1)).sum().item() for p in (0.02, 1e-3)]
    assert sums[0] == pytest.approx(sums[1], rel=0.01)
    assert scores.max(1).values.sum().item() > sums[1]


@pytest.mark.parametrize(("tokens", "experts"), [(1, 4), (7, 3), (13, 4), (5, 5), (9, 1)])
def test_no_expert_gets_more_than_its_places(tokens, experts):
    scores = torch.randn(tokens, experts)
    scores[:, 0] += 5
    counts = assign_evenly(scores).bincount(minlength=experts)
    assert counts.sum() == tokens
    assert counts.max() <= -(-tokens // experts)


def test_equal_tokens_are_spread():
    assert assign_evenly(torch.ones(12, 4)).bincount().tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_is_the_papers_equation_2(training):
    moe = MoE(BalancedAssignment(D, E), Each([nn.Linear(D, 3, bias=False) for _ in range(E)])).train(training)
    sharpen(moe)
    x = torch.randn(T, D, requires_grad=True)
    p, x64 = doubled(moe), x.detach().double().requires_grad_()
    scores = x64 @ p["router.weight"].t()
    chosen = assign_evenly(scores.detach().float()) if training else scores.argmax(1)
    slow = [torch.sigmoid(scores[t, e]) * (p[f"experts.experts.{e}.weight"] @ x64[t]) for t, e in enumerate(chosen)]
    agree(moe(x), [x, *moe.parameters()], torch.stack(slow), [x64, *p.values()])


def test_evaluation_is_greedy():
    router = BalancedAssignment(D, E).eval()
    x = torch.ones(8, D)
    assert route(router, x).counts.max() == 8
    assert route(router.train(), x).counts.max() == 3
