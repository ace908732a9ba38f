"""Fault: a router that does not learn while its experts do."""

from __future__ import annotations

from collections.abc import Iterator

from moeify.inspect.faults.finding import Finding, Inapplicable
from moeify.inspect.faults.gradients import learning
from moeify.inspect.faults.observed import Observed


def frozen_router(seen: Observed) -> Iterator[Finding]:
    """No parameter of the router learns while the experts do: the routing never adapts to what the experts learn."""
    routers = {name: layer for name, layer in seen.layers.items() if layer.router and list(layer.router.parameters())}
    if not routers:
        raise Inapplicable("no router has parameters")
    for name, layer in routers.items():
        if layer.router and learning(layer.experts) and not learning(layer.router):
            parameters = sum(p.numel() for p in layer.router.parameters())
            yield Finding(
                layer=name,
                cause="the router is frozen while its experts learn",
                evidence=f"0 of the router's {parameters} parameters require a gradient",
                fix="unfreeze it: moeify.train.unfreeze(model, 'router'), before the optimizer is made",
            )
