"""Fault: a balance loss that grows with gradient accumulation."""

from __future__ import annotations

from collections.abc import Iterator

from moeify.inspect.faults.auxiliary import size
from moeify.inspect.faults.finding import Finding, Inapplicable
from moeify.inspect.faults.observed import Observed


def balance_accumulated(seen: Observed) -> Iterator[Finding]:
    """A step of n equal micro-batches has n times the balance gradient of a step of one of them; both must be equal.

    Any factor above 1.05 is a fault; the 0.05 allows for rounding and padding. transformers' Trainer divides the loss
    of the task by the tokens of the step, and adds the balance loss of every micro-batch undivided.
    """
    n = seen.training.accumulation
    if n < 2:
        raise Inapplicable("a step has one micro-batch")
    one = sum(map(size, seen.single_step.values()))
    if not one:
        raise Inapplicable("no balance loss reaches the routers")
    many = sum(map(size, seen.auxiliary([seen.padded] * n).values()))
    if many / one > 1.05:
        yield Finding(
            cause="the balance loss is multiplied by the accumulation steps",
            evidence=f"the same micro-batch {n} times in a step: the balance gradient is {many / one:.2f} times as "
            "large",
            fix="use moeify.train.SparseTrainer, whose gradient does not depend on the cut; or divide the weight of "
            "the balance loss by gradient_accumulation_steps",
        )
