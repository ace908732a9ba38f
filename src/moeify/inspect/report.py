"""The report of a model's or a trace's routing: every panel that its data allow, in one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeify.inspect.html_page import write_page
from moeify.inspect.panels.coactivation import coactivation
from moeify.inspect.panels.coloured_text import coloured_text
from moeify.inspect.panels.coverage import coverage
from moeify.inspect.panels.dead import dead
from moeify.inspect.panels.drops import drops
from moeify.inspect.panels.entropy import entropy
from moeify.inspect.panels.importance import importance
from moeify.inspect.panels.load_by_layer import load_by_layer
from moeify.inspect.panels.margin import margin
from moeify.inspect.panels.panel import NotMeasured, Panel
from moeify.inspect.panels.paths import paths
from moeify.inspect.panels.reuse import reuse
from moeify.inspect.panels.slots import slots
from moeify.inspect.panels.specialisation import specialisation
from moeify.inspect.panels.top_tokens import top_tokens
from moeify.inspect.panels.violation import violation
from moeify.inspect.trace import Trace

Maker = Callable[[], Panel | Sequence[Panel]]

OF_TRACES: dict[str, tuple[Callable[[Trace], Panel | Sequence[Panel]], ...]] = {
    "Load": (load_by_layer, violation, dead, importance, coverage, drops),
    "Router": (entropy, margin),
    "Specialisation": (specialisation, top_tokens),
    "Structure": (coactivation, paths, slots),
    "Text": (coloured_text,),
    "Time": (reuse,),
}
"""The panels that a trace alone gives, by the tab that they stand in."""


@dataclass
class Report:
    """Panels by tab, and what could not be shown.

    Attributes:
        title: what was looked at.
        facts: about it, by name.
        groups: the panels by tab.
        missing: what is not shown, and why.
    """

    title: str
    facts: dict[str, Any]
    groups: dict[str, list[Panel]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def panels(self) -> list[Panel]:
        """All panels."""
        return [panel for group in self.groups.values() for panel in group]

    def add(self, group: str, name: str, make: Maker) -> None:
        """Put a panel into a tab, or its reason into what is missing."""
        try:
            made = make()
        except NotMeasured as reason:
            self.missing.append(f"{name}: {reason}")
            return
        self.groups.setdefault(group, []).extend([made] if isinstance(made, Panel) else made)

    def write(self, file: Path) -> None:
        """Write the page."""
        write_page(file, self.title, self.facts, self.groups, self.missing)

    def to_dict(self) -> dict[str, Any]:
        """Facts, and the numbers and advice of every panel, as plain values for JSON."""
        panels = [panel.to_dict() | {"group": group} for group, made in self.groups.items() for panel in made]
        return {"title": self.title, "facts": self.facts, "panels": panels, "missing": self.missing}


def report(trace: Trace, *, file: str | Path | None = None) -> Report:
    """Everything that can be seen in a trace, and what to do about it.

    Args:
        trace: of a model, or read from a file.
        file: where to write it as a page, if it is to be written.
    """
    made = Report(str(trace.header.get("model") or "A trace"), facts_of(trace))
    for group, functions in OF_TRACES.items():
        for function in functions:
            made.add(group, _words(function.__name__), lambda function=function: function(trace))
    if file is not None:
        made.write(Path(file))
    return made


def facts_of(trace: Trace) -> dict[str, Any]:
    """Sizes of a trace in words."""
    experts = sorted({layer.num_experts for layer in trace})
    k = sorted({layer.k for layer in trace})
    return {
        "sparse layers": len(trace.layers),
        "experts": _range(experts),
        "per token": "all, by weight" if k == [0] else _range(k),
        "tokens": f"{sum(map(len, trace.tables)):,}",
        **{name: value for name, value in trace.header.items() if name in ("format", "source")},
    }


def _range(values: list[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _words(name: str) -> str:
    return name.replace("_", " ")
