"""A line with the time that is left, for whatever takes longer than ten seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

EVERY = 10.0
"""Seconds until the first line, and between lines."""


def with_progress(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one by one, with a line of progress for every ten seconds that they take.

    Args:
        items: what is worked through.
        what: what is done, for the line.
    """
    started = told = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - told >= EVERY:
            told = now
            print(f"{what}: {done} of {len(items)}, about {left(now - started, done, len(items))} left", flush=True)
        yield item


def left(seconds: float, done: int, total: int) -> str:
    """The time that is left if all goes on as it did: `40 s`, or `3 min`."""
    rest = seconds / done * (total - done)
    return f"{rest:.0f} s" if rest < 100 else f"{rest / 60:.0f} min"
