"""Fault: experts with massive activations, on which the whole model depends."""

from __future__ import annotations

from collections.abc import Iterator

from moeify.inspect.faults.finding import Finding
from moeify.inspect.faults.observed import Observed
from moeify.inspect.measurements import outliers


def super_experts(seen: Observed) -> Iterator[Finding]:
    """A few experts return activations thousands of times larger than usual, and the model depends on them.

    The criterion is that of `moeify.inspect.measurements.outliers.super_experts`.
    """
    for name, which in outliers.super_experts(seen.outputs).items():
        found = seen.outputs[name]
        peaks = found.peak[which]
        yield Finding(
            layer=name,
            cause="super-experts: a few experts return massive activations",
            evidence=", ".join(
                f"expert {e} reaches {peak:.3g}" for e, peak in zip(which[:4], peaks.tolist(), strict=False)
            )
            + f", {float(peaks.max()) / found.median:,.0f} times the median magnitude {found.median:.2g}",
            fix="leave these experts out of pruning and merging, and keep them in more bits; in training, clip "
            "gradients and lower the learning rate",
        )
