"""Statistics that claims report: paired differences with their interval, and the correlation of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import torch
from torch import Tensor

T_95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 10: 2.262}
"""The 97.5 % quantile of Student's t for this many seeds."""


def interval(one: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Lower end of the 95 % interval, mean and upper end of the differences of two arms by seed.

    Half the interval's width is the smallest difference that these seeds could tell from none.
    """
    differences = [a - b for a, b in zip(one, other, strict=True)]
    n, mean = len(differences), fmean(differences)
    half = T_95[n] * stdev(differences) / math.sqrt(n) if n > 1 else math.inf
    return mean - half, mean, mean + half


def paired(one: Sequence[float], other: Sequence[float]) -> str:
    """The mean of the differences of two arms by seed, with its 95 % interval."""
    low, mean, high = interval(one, other)
    return f"{mean:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}"


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of numbers without ties."""
    ranks = [x.argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
