from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify import assign
from moeify.capacity import per_choice
from moeify.routers import Capacity, Router, TopK
from strategies import route, seeds, sharpen


class Some(Router):
    """Every token asks for another number of experts."""

    def forward(self, x, context):
        expert = torch.tensor([0, 0, 1, 1])
        routing = assign(expert.unsqueeze(1), torch.ones(4, 1), 2, shape=(2,), positions=torch.tensor([0, 1, 0, 1]))
        return replace(routing, choices=None)


@given(st.floats(0.1, 2.0), seeds)
def test_no_expert_gets_more_rows_than_its_capacity(factor, seed):
    torch.manual_seed(seed)
    router = Capacity(TopK(8, 4), factor=factor)
    sharpen(router)
    routing = route(router, torch.randn(16, 8))
    assert routing.counts.max() <= per_choice(factor, 16, 4, 2)
    assert routing.assigned.sum() == 32


def test_a_capacity_for_everyone_drops_nothing():
    router = Capacity(TopK(8, 4), factor=2.0)
    sharpen(router)
    x = torch.randn(16, 8)
    assert torch.equal(route(router, x).source, route(router.router, x).source)


def test_a_dropped_token_gets_nothing_from_the_experts():
    router = Capacity(TopK(8, 2, k=1, normalize=False), factor=0.1)
    torch.nn.init.zeros_(router.router.weight)
    routing = route(router, torch.ones(10, 8))
    y = routing.combine(routing.dispatch(torch.ones(10, 1)))
    assert y.count_nonzero() == 1


def test_renormalising_keeps_the_sum_of_weights_of_every_token_that_kept_a_row():
    router = Capacity(TopK(8, 4), factor=0.6, overflow="renormalize", priority="choice")
    sharpen(router)
    routing = route(router, torch.randn(32, 8))
    sums = torch.zeros(32).index_add(0, routing.source, routing.weight)
    kept = sums[routing.source.unique()]
    assert len(routing.source) < 64
    torch.testing.assert_close(kept, torch.ones_like(kept))


def test_a_decision_without_a_fixed_k_is_limited_by_its_average():
    assert route(Capacity(Some(), factor=0.5), torch.randn(2, 8)).counts.tolist() == [1, 1]


def test_a_capacity_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one slot"):
        route(Capacity(TopK(8, 4), factor=0.0), torch.randn(4, 8))
