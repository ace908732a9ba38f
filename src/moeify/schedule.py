"""Scalars as functions of the training step: loss weights, dropout, temperatures, k."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """The same value at every step."""
    return lambda step: value


def linear(start: float, end: float, steps: int) -> Schedule:
    """From `start` to `end` in equal parts over `steps` steps, then `end`."""
    return lambda step: start + (end - start) * min(1.0, step / steps)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """From `start` to `end` along half a cosine over `steps` steps, then `end`."""
    return lambda step: end + (start - end) * (1 + math.cos(math.pi * min(1.0, step / steps))) / 2


def piecewise(*points: tuple[int, float]) -> Schedule:
    """Jumps: the value of the last point whose step was reached; before the first point, its value."""

    def value(step: int) -> float:
        reached = [v for at, v in points if at <= step]
        return reached[-1] if reached else points[0][1]

    return value
