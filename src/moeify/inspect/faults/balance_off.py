"""Fault: no balancing; the balance loss is turned off, or its gradient never reaches the routers."""

from __future__ import annotations

from collections.abc import Iterator

from moeify.inspect.faults.auxiliary import size
from moeify.inspect.faults.finding import Finding, Unknown
from moeify.inspect.faults.observed import Observed


def balance_off(seen: Observed) -> Iterator[Finding]:
    """In a training step no auxiliary loss reaches any router, and no controller moves a selection bias.

    The gradient at the logits is measured with the weights of the experts detached, which excludes the task loss; the
    threshold is exactly zero. transformers computes its balance loss only with output_router_logits=True, which is off
    by default, and many of its families have none.
    """
    if seen.training.moves_biases:
        return
    if any(size(decided) for decided in seen.single_step.values()):
        return
    if seen.training.moves_biases is None and _has_bias(seen):
        raise Unknown(
            "no balance loss reaches the routers; whether something moves their selection biases is not known"
        )
    asked = getattr(getattr(seen.model, "config", None), "router_aux_loss_coef", 0) or 0
    yield Finding(
        cause="a balance loss is configured and never reaches the routers" if asked else "nothing balances the experts",
        evidence=f"the gradient of balance and z-losses at the logits of all {len(seen.layers)} layers is exactly 0"
        + (f"; router_aux_loss_coef={asked:g}" if asked else ""),
        fix="train with moeify.train.SparseTrainer, which balances any MoE; or output_router_logits=True, if the "
        "model has a balance loss of its own",
    )


def _has_bias(seen: Observed) -> bool:
    return any(getattr(o, n).any() for layer in seen.layers.values() for o, n in layer.selection_biases())
