"""Fault: a capacity drops too many rows."""

from __future__ import annotations

from collections.abc import Iterator

from moeify.inspect.faults.finding import Finding, Unknown
from moeify.inspect.faults.observed import ROWS, Observed


def capacity_drops(seen: Observed) -> Iterator[Finding]:
    """More than 1 % of the chosen rows are not computed, or have a weight of 0: the capacity is too small.

    Switch (arXiv 2101.03961, section 2.2) keeps dropped tokens below 1 %.
    """
    for layer in seen.trace:
        chosen = layer.experts >= 0
        if not layer.k:
            continue
        if int(chosen.sum()) < ROWS:
            raise Unknown(f"too little data: {int(chosen.sum())} rows, and it takes {ROWS} to tell 1 % from nothing")
        lost = chosen & False if layer.dropped is None else layer.dropped
        if layer.weights is not None:
            lost = lost | (chosen & (layer.weights == 0))
        share = int(lost.sum()) / int(chosen.sum())
        if share > 0.01:
            tokens = float(((lost | ~chosen).all(-1)).float().mean())
            evidence = f"{share:.1%} of {int(chosen.sum())} rows are dropped; {tokens:.1%} of the tokens keep none"
            yield dropped(layer.name, evidence)


def dropped(layer: str, evidence: str) -> Finding:
    """The finding about a layer whose capacity drops rows."""
    return Finding(
        layer=layer,
        cause="a capacity drops rows",
        evidence=evidence,
        fix="balance the load, raise the capacity factor (1.25 to 2), or use dropless experts, as moeify's are",
    )
