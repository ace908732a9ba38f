"""Fault: experts that compute rows and do not learn."""

from __future__ import annotations

from collections.abc import Iterator

from moeify.inspect.faults.finding import Finding, Unknown
from moeify.inspect.faults.gradients import learning
from moeify.inspect.faults.observed import Observed


def frozen_experts(seen: Observed) -> Iterator[Finding]:
    """Experts compute rows and get no gradient while their router learns: they are frozen, or cut off from the loss.

    Exactly zero is the threshold: a row with a weight that is not zero has a gradient that is not.
    """
    known = False
    for name, layer in seen.layers.items():
        if learning(layer.router) and not learning(layer.experts):
            known = True
            yield _finding(name, f"0 of {sum(p.numel() for p in layer.experts.parameters())} parameters learn")
            continue
        if (found := seen.gradients.get(name)) is None or (without := found.without) is None:
            continue
        known = True
        if without.any():
            some = ", ".join(map(str, without.nonzero().flatten().tolist()[:8]))
            yield _finding(name, f"{int(without.sum())} experts computed rows and have a gradient of 0: {some}")
    if not known:
        raise Unknown("the experts' weights are not stacked, so the gradient of each expert is not known")


def _finding(name: str, evidence: str) -> Finding:
    return Finding(
        layer=name,
        cause="experts get no gradient while their router learns",
        evidence=evidence,
        fix="moeify.train.unfreeze(model, 'experts'), or look for a detach() or no_grad() around them; if only the "
        "router is to learn, nothing is wrong",
    )
