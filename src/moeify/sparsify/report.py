"""The table that `sparsify` prints."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from moeify.experts.ffn import FFN
from moeify.find.shapes import Site
from moeify.flops import Count
from moeify.moe import MoE
from moeify.routers.base import Router


@dataclass(frozen=True)
class Report:
    """What `sparsify` did.

    Attributes:
        sites: the dense modules that were replaced.
        layers: the sparse layer of each site.
        before: parameters and FLOPs of the dense model.
        after: parameters and FLOPs of the sparse model.
        difference: largest change of an output on the probe, None if nothing was verified.
        left: the networks that stay dense, by name, with the reason of each.
    """

    sites: list[Site]
    layers: list[MoE]
    before: Count
    after: Count
    difference: float | None
    left: dict[str, str] = field(default_factory=dict)

    def show(self, console: Console | None = None, *, piece: str = "token") -> None:
        """Print the table.

        Args:
            console: where to; by default the terminal.
            piece: what the experts receive one by one.
        """
        console = Console() if console is None else console
        layers = Table(title="sparse layers", title_justify="left")
        for heading in ("stack", "layers", "experts", "router", "shared"):
            layers.add_column(heading, overflow="fold")
        for stack in dict.fromkeys(site.stack for site in self.sites):
            inside = [(s, m) for s, m in zip(self.sites, self.layers, strict=True) if s.stack == stack]
            layer = inside[0][1]
            layers.add_row(
                stack or "(model)", str(len(inside)), _experts(*inside[0]), _router(layer),
                "-" if layer.shared is None else type(layer.shared).__name__,
            )  # fmt: skip
        console.print(layers)
        if self.left:
            console.print(self._left())
        totals = Table()
        for heading in ("", "dense", "sparse"):
            totals.add_column(heading, justify="right" if heading else "left")
        for row, name in (
            ("parameters", "parameters"),
            (f"parameters used per {piece}", "active_parameters"),
            (f"forward FLOPs per {piece}", "flops"),
        ):
            totals.add_row(row, *(f"{getattr(c, name):,.0f}" for c in (self.before, self.after)))
        console.print(totals)
        if self.difference is None:
            console.print("function difference: not verified, as asked for")
        else:
            console.print(f"function difference on a probe: {self.difference:.3g} (largest change of an output)")

    def _left(self) -> Table:
        table = Table("modules", "count", "why", title="left dense", title_justify="left")
        alike = Counter((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), why) for name, why in self.left.items())
        for (name, why), number in alike.items():
            table.add_row(name, str(number), why)
        return table


def _experts(site: Site, layer: MoE) -> str:
    experts = layer.experts
    size = f" of {experts.hidden} hidden units" if isinstance(experts, FFN) else ""
    parts = f", on {site.heads} sub-tokens of a token" if site.heads > 1 else ""
    return f"{experts.num_experts}{size}{parts}"


def _router(layer: MoE) -> str:
    """The router and the routers that it wraps, with their settings."""
    routers = [part for part in layer.router.modules() if isinstance(part, Router)]
    return "\n".join(f"{type(router).__name__}({router.extra_repr()})" for router in routers)
