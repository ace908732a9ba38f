"""The time of experts on one device, from the rows of each of them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify.parallel import ExpertWork, GroupedCost

H100 = (989e12, 3.35e12)
loads = st.lists(st.integers(0, 5000), min_size=1, max_size=16).map(torch.tensor)


def work(counts, **changed):
    return ExpertWork.of(counts, **({"width": 1024, "hidden": 512} | changed))


def test_work_is_counted_in_whole_tiles_and_in_experts_that_have_a_row():
    found = work(torch.tensor([1, 0, 20]), width=64, hidden=32)  # 10.5 rows on average: tiles of 16
    size = 3 * 64 * 32
    assert found.flops == (1 + 2) * 16 * 2 * size
    assert found.weights == 2 * 2 * size
    assert found.moved == 21 * 2 * (2 * 64 + 3 * 32)
    assert found.tiles == 3 * (1 + 1)


@given(loads)
def test_twice_the_rows_never_take_less_time(counts):
    once, twice = (GroupedCost().seconds(work(c), *H100) for c in (counts, 2 * counts))
    assert twice >= once


@given(loads)
def test_the_order_of_experts_does_not_matter(counts):
    there, back = (GroupedCost().seconds(work(c), *H100) for c in (counts, counts.flip(0)))
    assert torch.equal(there, back)


def test_on_one_device_many_rows_take_equally_long_wherever_they_go():
    spread, crowded = (
        float(GroupedCost().seconds(work(counts), *H100))
        for counts in (torch.full((8,), 4096), torch.tensor([8 * 4096 - 7, 1, 1, 1, 1, 1, 1, 1]))
    )
    assert crowded == pytest.approx(spread, rel=0.02)


def test_a_fit_recovers_the_cost_that_made_the_times():
    truth = GroupedCost(launch=5e-5, products=0.5, memory=0.6, passing=1.5)
    parts = [
        work(torch.full((experts,), rows), width=width, hidden=hidden)
        for experts in (4, 32, 128) for rows in (1, 16, 64, 300, 2000) for width, hidden in ((1024, 512), (4096, 1536))
    ]  # fmt: skip
    works = ExpertWork.cat(parts)
    times = truth.seconds(works, *H100)
    found = GroupedCost.fit(works, times, *H100).seconds(works, *H100)
    assert (found / times - 1).abs().max() < 0.05


def test_slices_that_are_not_aligned_are_slower():
    even, odd = (GroupedCost().seconds(work(torch.full((8,), 64), hidden=h), *H100) for h in (48, 44))
    assert odd > even
