"""Rows in the order of slots, where an expert may have several."""

import pytest
import torch

from moeify.experts.exchange import by_slot


@pytest.mark.parametrize(("turn", "expected"), [(0, [2, 0, 2, 2, 1, 1]), (1, [2, 0, 1, 1, 2, 2])])
def test_the_slots_of_an_expert_share_its_rows_and_another_one_gets_more_in_every_turn(turn, expected):
    counts, slots = torch.tensor([5, 0, 3]), torch.tensor([0, 1, 2, 0, 0, 2])
    order, per_slot = by_slot(counts, slots, turn)
    assert per_slot.tolist() == expected
    assert order.sort().values.tolist() == list(range(8))
    expert = torch.arange(3).repeat_interleave(counts)
    assert torch.equal(expert[order], slots.repeat_interleave(per_slot))


def test_one_slot_for_every_expert_is_an_order_of_the_experts():
    counts, slots = torch.tensor([2, 0, 1]), torch.tensor([2, 0, 1])
    order, per_slot = by_slot(counts, slots)
    assert order.tolist() == [2, 0, 1]
    assert per_slot.tolist() == [1, 2, 0]
