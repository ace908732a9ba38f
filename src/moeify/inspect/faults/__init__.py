"""Faults of sparse models, one function each: from observations of a model to findings with cause, evidence and fix.

A function yields its findings, none if the model is healthy. It raises `Unknown` if the observations do not decide,
`NotGiven` if it needs an input that the caller did not give, such as a trainer, and `Inapplicable` if the model has no
part that could have the fault. Causes come before their consequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from moeify.inspect.faults.balance_accumulated import balance_accumulated
from moeify.inspect.faults.balance_definition import balance_padded, balance_pooled
from moeify.inspect.faults.balance_off import balance_off
from moeify.inspect.faults.bias_unmoved import bias_unmoved
from moeify.inspect.faults.biased_weights import biased_weights
from moeify.inspect.faults.capacity_drops import capacity_drops
from moeify.inspect.faults.collapse import blind_collapse, collapse
from moeify.inspect.faults.dead_experts import dead_experts
from moeify.inspect.faults.detached_router import detached_router
from moeify.inspect.faults.exploding_logits import exploding_logits
from moeify.inspect.faults.finding import Finding, Inapplicable, NotGiven, Unknown
from moeify.inspect.faults.frozen_experts import frozen_experts
from moeify.inspect.faults.frozen_router import frozen_router
from moeify.inspect.faults.half_precision_router import half_precision_router
from moeify.inspect.faults.identical_experts import identical_experts
from moeify.inspect.faults.last_micro_batch import last_micro_batch
from moeify.inspect.faults.noisy_evaluation import noisy_evaluation
from moeify.inspect.faults.not_finite import not_finite
from moeify.inspect.faults.observed import Observed
from moeify.inspect.faults.super_experts import super_experts
from moeify.inspect.faults.top1_renormalised import top1_renormalised
from moeify.inspect.faults.training import Training, training_of
from moeify.inspect.faults.undecided_router import undecided_router

Fault = Callable[[Observed], Iterator[Finding]]

FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        not_finite, frozen_router, frozen_experts, top1_renormalised, exploding_logits, detached_router,
        half_precision_router, noisy_evaluation, biased_weights, identical_experts, super_experts, bias_unmoved,
        balance_off, balance_accumulated, balance_pooled, balance_padded, last_micro_batch, capacity_drops,
        undecided_router, blind_collapse, collapse, dead_experts,
    )
}  # fmt: skip
"""All faults by name; causes before consequences."""

__all__ = ["FAULTS", "Fault", "Finding", "Inapplicable", "NotGiven", "Observed", "Training", "Unknown", "training_of"]
