"""MaxVio, load, dead experts, entropies and information, against their values where these are known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify import MoE, record
from moeify.experts import FFN
from moeify.routers import TopK
from moeify.statistics import (
    dead,
    drop_rate,
    effective_share,
    information,
    load,
    load_entropy,
    load_variation,
    max_violation,
    router_entropy,
)


@pytest.mark.parametrize("experts", [1, 2, 8])
def test_an_even_load(experts: int):
    rows = torch.full((3, experts), 5)
    assert max_violation(rows).tolist() == [0, 0, 0]
    assert dead(rows).tolist() == [0, 0, 0]
    assert load_entropy(rows).tolist() == pytest.approx([float(experts > 1)] * 3)
    assert effective_share(rows).tolist() == pytest.approx([1] * 3)
    assert load_variation(rows).tolist() == [0, 0, 0]


@pytest.mark.parametrize("experts", [2, 8])
def test_one_expert_alone(experts: int):
    rows = torch.zeros(experts).index_fill(0, torch.tensor([1]), 7.0)
    assert max_violation(rows).item() == experts - 1
    assert dead(rows).item() == experts - 1
    assert load_entropy(rows).item() == 0
    assert effective_share(rows).item() == pytest.approx(1 / experts)
    assert load_variation(rows).item() == pytest.approx(math.sqrt(experts - 1))


def test_an_expert_is_dead_below_a_hundredth_of_the_mean():
    assert dead(torch.tensor([9, 1991])).item() == 1
    assert dead(torch.tensor([10, 1990])).item() == 0
    assert dead(torch.tensor([400, 1600]), below=0.5).item() == 1


def test_no_rows_are_no_load():
    nothing = torch.zeros(4)
    assert load(nothing).tolist() == [0, 0, 0, 0]
    assert (dead(nothing).item(), load_entropy(nothing).item(), drop_rate(nothing, nothing).item()) == (4, 0, 1)


@given(st.lists(st.integers(0, 50), min_size=2, max_size=8).filter(any), st.integers(2, 9))
def test_shares_sum_to_one_and_no_measure_depends_on_how_many_rows_there_are(rows: list[int], times: int):
    rows = torch.tensor(rows)
    assert load(rows).sum().item() == pytest.approx(1)
    assert 0 <= load_entropy(rows).item() <= 1 + 1e-6
    for measure in (max_violation, load_entropy):
        assert measure(rows * times).item() == pytest.approx(measure(rows).item(), abs=1e-5)


def test_rows_that_a_capacity_dropped():
    assert drop_rate(torch.tensor([6, 2]), torch.tensor([3, 2])).item() == pytest.approx(3 / 8)


def test_the_entropy_of_scores_that_do_not_sum_to_one():
    assert router_entropy(torch.tensor([[0.2, 0.2], [3.0, 0.0]])).tolist() == pytest.approx([math.log(2), 0])


def test_a_domain_for_every_expert_tells_all_its_bits():
    assert information(torch.eye(4)[None] * 3).item() == pytest.approx(2)
    assert information(torch.ones(2, 4)).item() == pytest.approx(0, abs=1e-6)


def test_padding_is_no_load():
    layer = MoE(TopK(8, 4, k=2), FFN(4, 8, 16))
    layer.context.mask(torch.tensor([[1, 1, 1, 0, 0]]))
    with record(layer) as decisions:
        layer(torch.randn(1, 5, 8))
    assert decisions[""].assigned.sum() == 6
