"""Micro-batches that are functions of the number of their step."""

import pytest
import torch

from moeify.integrations.replicas.batches import Batches

NUMBERS = [{"x": torch.tensor(i)} for i in range(10)]


def test_every_sample_is_in_one_micro_batch_of_an_epoch_and_epochs_differ():
    batches = Batches(NUMBERS, size=2, micro_batches=3)
    seen = torch.cat([batch["x"] for step in range(5) for batch in batches(step)]).view(3, 10)
    assert [sorted(epoch) for epoch in seen.tolist()] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in seen.tolist()}) == 3


def test_a_step_is_the_same_whenever_it_is_asked_for_and_the_seed_orders_it():
    batches = Batches(NUMBERS, size=2, micro_batches=3)
    late = [batch["x"].tolist() for batch in batches(7)]
    batches(0)[2]
    assert [batch["x"].tolist() for batch in Batches(NUMBERS, size=2, micro_batches=3)(7)] == late
    assert [batch["x"].tolist() for batch in Batches(NUMBERS, size=2, micro_batches=3, seed=1)(7)] != late


def test_only_the_samples_of_a_micro_batch_that_is_used_are_read():
    read = []

    class Counting(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    Batches(Counting(NUMBERS), size=2, micro_batches=3)(1)[1]
    assert len(read) == 2


def test_what_holds_nothing_is_refused():
    with pytest.raises(ValueError, match="no samples"):
        Batches([], size=2, micro_batches=3)
    with pytest.raises(ValueError, match="micro_batches=0"):
        Batches(NUMBERS, size=2, micro_batches=0)
    with pytest.raises(IndexError, match="micro-batch 3 of 3"):
        Batches(NUMBERS, size=2, micro_batches=3)(0)[3]
