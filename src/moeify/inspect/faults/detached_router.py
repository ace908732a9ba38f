"""Fault: a trainable router that gets no gradient."""

from __future__ import annotations

from collections.abc import Iterator

from moeify.inspect.faults.finding import Finding, Inapplicable
from moeify.inspect.faults.observed import Observed


def detached_router(seen: Observed) -> Iterator[Finding]:
    """The router is trainable, and its gradient of the task loss is exactly 0: it is detached from the autograd graph.

    k = 1 with constant weights, whose gradient is 0 or rounding, is `top1_renormalised`.
    """
    learning = {name: found for name, found in seen.gradients.items() if found.router is not None}
    if not learning:
        raise Inapplicable("no router has parameters that learn")
    single = {layer.name for layer in seen.trace if layer.k == 1}
    for name, found in learning.items():
        if found.router == 0 and name not in single:
            yield Finding(
                layer=name,
                cause="the loss does not reach the router",
                evidence=f"the gradient of its parameters is exactly 0 over {int(found.rows.sum())} rows",
                fix="look for detach(), no_grad() or .data between router and experts, and for experts whose output "
                "is not multiplied by the weights",
            )
