"""The picture of what independent implementations agree on, drawn from the rows of the last comparison."""

from __future__ import annotations

from pathlib import Path

from common.plots import BLUE, IMAGES, RED, save
from figures.rows import table

COMMIT = "235fbf4"
"""Of the last comparison with all peers."""
LEAST = 1e-9
"""Where differences below are drawn, none among them."""


def draw(folder: Path = IMAGES) -> Path:
    """Draw the differences by peer beside what was allowed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = table("claims/results/independent.csv").where(commit=COMMIT).rows
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    figure = Figure(figsize=(6.4, 0.9 + 0.35 * len(peers)), layout="constrained")
    axis = figure.subplots()
    axis.axvspan(LEAST / 2, float(rows[0]["tolerance"]), color=BLUE, alpha=0.1, linewidth=0, label="allowed")
    for result, colour in (("agrees", BLUE), ("differs, explained", RED)):
        kept = [row for row in rows if row["result"] == result]
        places = [-peers.index(row["peer"]) for row in kept]
        sizes = [max(float(row["difference"]), LEAST) for row in kept]
        axis.plot(sizes, places, "o", color=colour, markersize=5, alpha=0.4, label=result)
    axis.set_xscale("log")
    axis.set_yticks([-at for at in range(len(peers))], peers)
    axis.set_ylim(0.6 - len(peers), 0.6)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.supxlabel(f"largest difference of a quantity; {LEAST:g} and below at the left", fontsize=9)
    return save(figure, folder / "independent.svg")
