"""Fault: experts that are copies of each other."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moeify.inspect.collapse import weight_cosine
from moeify.inspect.faults.finding import Finding, Unknown
from moeify.inspect.faults.observed import Observed

APART = 2**-8
"""Relative distance of two experts' weights below which they are the same expert, rounded to bf16."""


def identical_experts(seen: Observed) -> Iterator[Finding]:
    """Two experts have the same weights, as upcycling by copies leaves them: they have not diverged.

    Their distance is below 2^-8 of their size, the largest error of rounding to bf16, so that a saved model may not
    hold the difference. Sparse upcycling (arXiv 2212.05055) starts there; only different tokens pull copies apart.
    """
    known = False
    for name, layer in seen.layers.items():
        try:
            cosines = weight_cosine(layer.experts)
        except ValueError:
            continue
        known = True
        if len(cosines) < 2:
            continue
        distance = (2 - 2 * cosines).clamp_min(0).sqrt()
        alike = (distance < APART).fill_diagonal_(False)
        if alike.any():
            copies = int(alike.any(-1).sum())
            others = distance[~torch.eye(len(distance), dtype=torch.bool, device=distance.device)]
            yield Finding(
                layer=name,
                cause="experts are copies of each other" if copies < len(alike) else "the experts never diverged",
                evidence=f"{copies} of {len(alike)} experts have a copy nearer than {APART:.1e} of their size; the "
                f"median distance of two is {float(others.median()):.1e}",
                fix="make the copies differ (copies with noise=0.1 or drop=0.5), see that the router learns, and train "
                "longer; or merge them, as they cost memory and add nothing",
            )
    if not known:
        raise Unknown("the experts' weights are not stacked, so they were not compared")
