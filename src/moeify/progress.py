"""Print the remaining time of work that takes longer than ten seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from moeify.notices import notify

T = TypeVar("T")

EVERY = 10.0
"""Seconds until the first line, and between lines."""


class Progress:
    """Prints every ten seconds how much of the work is done, and how long the rest will take.

    Args:
        what: the name of the work, for the line.
        total: amount of work, in a unit that takes about the same time everywhere, such as bytes.
    """

    def __init__(self, what: str, total: float) -> None:
        self.what, self.total = what, total
        self.started = self.printed = time.monotonic()

    def at(self, done: float, shown: str | None = None) -> None:
        """Print a line every ten seconds with the amount done, as `shown` or in percent."""
        now = time.monotonic()
        if done > 0 and now - self.printed >= EVERY:
            self.printed = now
            shown = f"{100 * min(done / self.total, 1):.0f} %" if shown is None else shown
            notify(f"{self.what}: {shown}, about {left(now - self.started, done, max(self.total, done))} left")


def with_progress(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one by one, with a line of progress for every ten seconds that they take.

    Args:
        items: any items.
        what: the name of the work, for the line.
    """
    progress = Progress(what, len(items))
    for done, item in enumerate(items):
        progress.at(done, f"{done} of {len(items)}")
        yield item


def left(seconds: float, done: float, total: float) -> str:
    """The remaining time at the average speed so far: `40 s`, or `3 min`."""
    rest = seconds / done * (total - done)
    return f"{rest:.0f} s" if rest < 100 else f"{rest / 60:.0f} min"
