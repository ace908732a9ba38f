"""Fault: experts with massive activations, on which the whole model depends."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moeify.inspect.faults.finding import Finding
from moeify.inspect.faults.observed import Observed

MASSIVE = 1000
"""An activation this many times the median magnitude is massive (Sun et al., arXiv 2402.17762, section 2)."""


def super_experts(seen: Observed) -> Iterator[Finding]:
    """A few experts return activations thousands of times larger than usual, and the model depends on them.

    Su et al. (arXiv 2507.23279) call an expert of the first three quarters of the layers a super-expert if its
    largest output is above the 99.5th percentile of all experts and a tenth of the largest. Some expert always is, so
    its output must also be massive: 1,000 times the median magnitude of its layer (Sun et al., arXiv 2402.17762).
    """
    outputs = seen.outputs
    peaks = torch.cat([found.peak for found in outputs.values()])
    threshold = max(float(peaks.quantile(0.995)), float(peaks.max()) / 10) if len(peaks) else 0.0
    for place, (name, found) in enumerate(outputs.items()):
        large = (found.peak >= threshold) & (found.peak >= MASSIVE * found.median)
        if place < 0.75 * len(outputs) and large.any() and found.median > 0:
            which = large.nonzero().flatten().tolist()
            yield Finding(
                layer=name,
                cause="super-experts: a few experts return massive activations",
                evidence=", ".join(f"expert {e} reaches {float(found.peak[e]):.3g}" for e in which[:4])
                + f", {float(found.peak.max()) / found.median:,.0f} times the median magnitude {found.median:.2g}",
                fix="leave these experts out of pruning and merging, and keep them in more bits; in training, clip "
                "gradients and lower the learning rate",
            )
