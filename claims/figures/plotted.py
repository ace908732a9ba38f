"""The smallest difference that the seeds could tell from none, of claims whose plot alone says what is compared."""

from __future__ import annotations

from common.plots import PLOTS
from common.statistics import T_95
from figures.rows import Figure

CLAIMS = (
    "balance", "branch_train_mix", "demo_balance", "densemixer", "harc", "over_sparsity", "phatgoose", "splits",
    "upcycling",
)  # fmt: skip


def plotted() -> dict[str, list[Figure]]:
    """By id."""
    return {f"{claim}.least": [_least(claim)] for claim in CLAIMS}


def _least(claim: str) -> Figure:
    """The largest of half the intervals that are drawn."""
    plot = PLOTS[claim]
    rows = plot.rows(claim)
    base = rows.where(**{plot.arm: plot.against})
    drawn = [rows.where(**{plot.arm: name}).minus(base, plot.value) for name in plot.names(rows)]
    return max((each.half(T_95[len(each.values)]) for each in drawn), key=lambda half: half.value)
