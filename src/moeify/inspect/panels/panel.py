"""A panel of the report: one question about a model's routing, answered by a picture, a table and advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moeify.inspect.panels.charts import Chart

Level = Literal["act", "look", "fine", "unknown"]
"""How urgent an advice is: a problem, a possible gain, nothing to do, or too little data."""


class NotMeasured(ValueError):
    """A panel has no data; the message names what is missing and how to get it."""


@dataclass(frozen=True)
class Table:
    """A table of numbers with a heading.

    Attributes:
        heading: names of the columns.
        rows: their values, one per column.
    """

    heading: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The advice of a panel: what its numbers show, and what to do.

    Attributes:
        level: how urgent it is.
        finding: the result in words.
        action: what to do.
        gain: what this can be expected to bring.
        source: where the number of the gain comes from.
    """

    level: Level
    finding: str
    action: str
    gain: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One question about a model's routing, answered.

    Attributes:
        title: a few words.
        question: the question in words, for a reader who does not know the term.
        picture: what is drawn.
        table: the numbers.
        advice: what to do.
        notes: what was sampled, binned or omitted.
    """

    title: str
    question: str
    picture: Chart
    table: Table
    advice: Advice
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Title, advice, notes and numbers as plain values for JSON, without the picture."""
        rows = [dict(zip(self.table.heading, row, strict=True)) for row in self.table.rows]
        return {"title": self.title, "advice": asdict(self.advice), "notes": list(self.notes), "rows": rows}
