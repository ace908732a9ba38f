"""Shares of experts: balanced, skewed, recorded and traced."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify import record
from moeify.parallel import Workload
from tiny_models import inputs, mixtral


def test_zipf_gives_the_first_its_part_and_orders_differ_between_layers():
    found = Workload.skewed(4, 1.0, layers=6)
    assert found.hottest == pytest.approx(4 / (1 + 1 / 2 + 1 / 3 + 1 / 4))
    assert len({tuple(row.tolist()) for row in found.shares[0]}) > 1
    assert torch.equal(Workload.skewed(4, 0.0).shares, Workload.balanced(4).shares)


def test_what_a_model_did_is_counted():
    model = mixtral()
    with record(model) as routings, torch.no_grad():
        model(**inputs(model))
    found = Workload.recorded(routings)
    (first, *_) = routings.values()
    assert found.shares.shape == (1, len(routings), 4)
    assert torch.allclose(found.shares[0, 0] * first.counts.sum(), first.counts.double())


def test_a_trace_is_cut_in_order_and_experts_that_are_not_there_are_not_counted():
    layer = SimpleNamespace(num_experts=3, experts=torch.tensor([[0, 1], [0, -1], [2, 1], [2, 2]]))
    found = Workload.traced([layer, layer], snapshots=2)
    assert torch.allclose(found.shares[:, 0], torch.tensor([[2 / 3, 1 / 3, 0], [0, 1 / 4, 3 / 4]]).double())
    assert Workload.traced([layer]).shares.shape[0] == 1  # four tokens are too few for two snapshots


def test_layers_of_different_sizes_are_refused():
    layers = [SimpleNamespace(num_experts=e, experts=torch.zeros(4, 1, dtype=torch.long)) for e in (2, 4)]
    with pytest.raises(ValueError, match="layers have 2, 4 experts"):
        Workload.traced(layers)


@given(st.lists(st.integers(0, 100), min_size=2, max_size=12), st.integers(1, 6))
def test_stretching_keeps_the_part_of_every_rank(counts, factor):
    found = Workload.counted(torch.tensor(counts)[None, None])
    assert torch.allclose(
        found.stretched(len(counts) * factor).shares.unflatten(-1, (-1, factor)).sum(-1), found.shares
    )
    half = Workload.counted(torch.tensor(counts * 2)[None, None]).stretched(2)
    assert torch.allclose(half.shares, torch.full_like(half.shares, 0.5))


def test_a_capacity_cuts_what_is_above_it():
    found = Workload.counted(torch.tensor([[[6, 1, 1]]]))
    assert found.kept(1.5) == pytest.approx(0.5 + 2 / 8)
    assert found.capped(1.5).shares.flatten().tolist() == pytest.approx([4 / 6, 1 / 6, 1 / 6])


def test_shares_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ValueError, match="sum to 1"):
        Workload(torch.ones(1, 1, 4))
