"""Fault: routing that is random in evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from moeify.inspect.faults.finding import Finding, Unknown
from moeify.inspect.faults.observed import Observed
from moeify.routing import Assignment


def noisy_evaluation(seen: Observed) -> Iterator[Finding]:
    """In evaluation the same tokens get different weights in a second pass: noise, jitter or dropout was left on.

    Two passes of one model on one machine agree to the last bits; 1e-3 of a weight is far more than that.
    """
    first, second = seen.passes
    known = [name for name in first if name in second and isinstance(first[name], Assignment)]
    if not known:
        raise Unknown("no layer sends its tokens to experts of their own")
    for name in known:
        one, other = first[name].weight_table(), second[name].weight_table()
        changed = ((one - other).abs() > 1e-3).any(-1)
        if changed.any():
            yield Finding(
                layer=name,
                cause="noise is left on in evaluation",
                evidence=f"{float(changed.float().mean()):.0%} of {len(one)} tokens got other weights in a second pass",
                fix="call model.eval(); add noise, jitter and dropout only where module.training is true",
            )
            return  # later layers differ because this one does
