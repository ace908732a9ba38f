"""Balance losses against their sums, written out."""

from dataclasses import replace
from math import exp, log

import pytest
import torch

from moeify import assign, losses
from moeify.routers import Capacity, TopK, sigmoid
from strategies import agree, route, sharpen

B, N, D, E, K = 3, 4, 5, 6, 2


def decision(**options):
    router = TopK(D, E, k=K, **options)
    sharpen(router)
    return route(router, torch.randn(B, N, D))


def slow_probability(scores):
    return [[s_j / sum(s) for s_j in s] for s in scores]


def slow_balance(index, p, demand=None):
    tokens = len(p)
    total = 0.0
    for j in range(E):
        asked = sum(float(j in row) for row in index.tolist()) / (K * tokens)
        f = asked if demand is None else float(demand[j] / demand.sum())
        total = total + f * sum(p_t[j] for p_t in p) / tokens
    return E * total


def scores_of(routing):
    """The decision with scores that are leaves, in fp32, and the same in fp64."""
    leaf = routing.scores.detach().requires_grad_()
    return replace(routing, scores=leaf), leaf, leaf.detach().double().requires_grad_()


@pytest.mark.parametrize("options", [{}, {"score": sigmoid}])
def test_balance_over_the_batch_is_switch_equations_4_to_6(options):
    routing, leaf, leaf64 = scores_of(decision(**options))
    slow = slow_balance(routing.index, slow_probability(leaf64))
    agree(losses.balance(routing), [leaf], slow, [leaf64])


def test_balance_may_take_its_demand_from_a_whole_step():
    routing, leaf, leaf64 = scores_of(decision())
    demand = torch.arange(1.0, E + 1)
    slow = slow_balance(routing.index, slow_probability(leaf64), demand)
    agree(losses.balance(routing, demand=demand), [leaf], slow, [leaf64])


def test_balance_by_sequence_is_each_sequences_own_averaged():
    routing, leaf, leaf64 = scores_of(decision(score=sigmoid))
    p = slow_probability(leaf64)
    slow = sum(slow_balance(routing.index[b * N : (b + 1) * N], p[b * N : (b + 1) * N]) for b in range(B)) / B
    agree(losses.balance(routing, "sequence"), [leaf], slow, [leaf64])


def test_importance_is_the_squared_variation_of_summed_weights():
    gates = torch.rand(4, K, requires_grad=True)
    index = torch.tensor([[0, 1], [2, 0], [1, 5], [3, 4]])
    gates64 = gates.detach().double().requires_grad_()
    sums = [sum(gates64[t, c] for t in range(4) for c in range(K) if index[t, c] == j) for j in range(E)]
    mean = sum(sums) / E
    slow = sum((s - mean) ** 2 for s in sums) / E / mean**2
    agree(losses.importance(assign(index, gates, E)), [gates], slow, [gates64])


def test_load_counts_the_rows_that_were_asked_for_before_any_were_dropped():
    router = Capacity(TopK(D, 2, k=1, normalize=False), factor=0.1)
    torch.nn.init.zeros_(router.router.weight)
    routing = route(router, torch.ones(8, D))
    assert routing.counts.sum() < 8
    assert losses.load(routing).item() == pytest.approx(1.0)  # counts 8 and 0: mean 4, deviation 4
    assert losses.share(routing).sum() == 1


def test_z_is_the_mean_squared_logsumexp():
    routing = decision()
    slow = sum(log(sum(exp(z) for z in row)) ** 2 for row in routing.logits.tolist()) / (B * N)
    assert losses.z(routing).item() == pytest.approx(slow, rel=1e-5)
