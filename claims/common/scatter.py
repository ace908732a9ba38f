"""Plots of claims that compare predictions with measurements, drawn from their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.plots import COLOURS, GREY, IMAGES, save
from figures.rows import table

MARKERS = "osD^vP*X"


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """What a picture of points shows.

    Attributes:
        pairs: the columns along both axes, for each a point of every row that has both.
        along: what the horizontal axis is.
        upward: what the vertical one is.
        by: the columns that tell the kinds of points apart; the pairs themselves if there is none.
        diagonal: a line where both axes are equal.
        where: values of columns that the rows have.
    """

    pairs: Sequence[tuple[str, str]]
    along: str
    upward: str
    by: Sequence[str] = ()
    diagonal: bool = True
    where: tuple[tuple[str, str], ...] = ()

    def points(self, claim: str) -> dict[str, list[tuple[float, float]]]:
        """The points of each kind."""
        found: dict[str, list[tuple[float, float]]] = {}
        for row in table(f"claims/results/{claim}.csv").where(**dict(self.where)).rows:
            for one, other in self.pairs:
                if row[one] and row[other]:
                    kind = ", ".join(row[column] for column in self.by) or one.replace("_", " ")
                    found.setdefault(kind, []).append((float(row[one]), float(row[other])))
        return found


SCATTERS = {
    "h100_layers": Scatter(
        pairs=[(f"ratio_{devices}", f"ratio_predicted_{devices}") for devices in (2, 4, 8, 16, 32)],
        along="time with skewed routing over balanced, measured on 2 to 32 H100", upward="predicted",
    ),
    "simumax": Scatter(
        pairs=[("real_ms", "ours_ms")], by=["cluster", "model"], where=(("routing", "balanced"), ("result", "failed")),
        along="step measured by SimuMax's authors, ms", upward="predicted, ms",
    ),
    "smartmoe": Scatter(
        pairs=[("speedup", "speedup_predicted")], by=["cluster", "devices"],
        along="speedup measured by SmartMoE's authors", upward="predicted",
    ),
    "virtual_devices_2": Scatter(
        pairs=[("measured_ms", "predicted_ms")], by=["model", "world"],
        along="CPU time of a step measured, ms", upward="predicted, ms",
    ),
    "virtual_devices_3": Scatter(
        pairs=[("measured_ms", "predicted_ms")], by=["model", "world"],
        along="CPU time of a step measured, ms, mean over rounds on idle cores", upward="predicted, ms",
    ),
    "hot_experts": Scatter(
        pairs=[("speedup", "predicted")], by=["routing", "arm"],
        along="times as fast as with experts in order, measured", upward="predicted",
    ),
    "placement": Scatter(
        pairs=[("devices", "speedup")], by=["routing"], diagonal=False, along="devices",
        upward="times as fast as without moves",
    ),
}  # fmt: skip


def draw(claim: str, plot: Scatter, folder: Path = IMAGES) -> Path:
    """Draw a claim's picture from its rows.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    points = plot.points(claim)
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    across, up = ([point[side] for kind in points.values() for point in kind] for side in (0, 1))
    for side, values in (("x", across), ("y", up)):
        _scale(axis, side, values)
    if plot.diagonal:
        ends = [*across, *up]
        axis.plot([min(ends), max(ends)], [min(ends), max(ends)], color=GREY, linewidth=1)
    for at, (kind, places) in enumerate(points.items()):
        marker, colour = MARKERS[at % len(MARKERS)], COLOURS[at % len(COLOURS)]
        axis.plot(*zip(*places, strict=True), marker, color=colour, markersize=5, alpha=0.8, label=kind)
    axis.set_xlabel(plot.along, fontsize=9)
    axis.set_ylabel(plot.upward, fontsize=9)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return save(figure, folder / f"{claim}.svg")


def _scale(axes: Any, side: str, values: Sequence[float]) -> None:
    """Logarithmic where values differ by more than a factor of 4."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

    if max(values) > 4 * min(values):
        axes.set(**{f"{side}scale": "log"})
        axis = getattr(axes, f"{side}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FormatStrFormatter("%g"))
        axis.set_minor_locator(NullLocator())
