"""Fault: weights that are NaN or infinite."""

from __future__ import annotations

from collections.abc import Iterator

from moeify.inspect.faults.finding import Finding
from moeify.inspect.faults.observed import Observed

FIX = "go back to the last checkpoint that is finite; lower the learning rate, clip gradients, use bf16 for fp16"


def not_finite(seen: Observed) -> Iterator[Finding]:
    """A parameter holds NaN or infinity: one such value spreads to later layers and invalidates all measurements."""
    for name, count in seen.not_finite:
        yield Finding(
            layer=name,
            cause="weights are NaN or infinite",
            evidence=f"{count} of {seen.model.get_parameter(name).numel()} values are not finite",
            fix=FIX,
        )
