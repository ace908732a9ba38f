"""Plots of claims, drawn from their rows into docs/images/claims: arms with the interval over seeds, and every seed.

cd claims && python -m common.plots           all of them; names after it draw some
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.statistics import interval
from figures.rows import Rows, table
from figures.texts import ROOT

IMAGES = ROOT / "docs/images/claims"
BLUE, GREY, RED = "#2166ac", "#9aa5b1", "#d6604d"
COLOURS = ("#2166ac", "#d6604d", "#4d9221", "#8073ac", "#b35806")


@dataclass(frozen=True, kw_only=True)
class Plot:
    """What a claim's picture shows.

    Attributes:
        value: the column, or how its values are called.
        unit: of the values, on the axis.
        arm: the column of the arms.
        arms: which of them are drawn, all by default.
        against: the arm from which differences are taken, paired by seed; the values themselves if there is none.
        over: a column along the horizontal axis; then every arm is a line.
        along: what that column is called.
        logarithmic: that axis is.
        where: values of columns that the rows have.
        panels: a column of which every value has a panel of its own.
        mark: a value that is marked, and what it is.
    """

    value: str
    unit: str
    arm: str = "arm"
    arms: Sequence[str] = ()
    against: str = ""
    over: str = ""
    along: str = ""
    logarithmic: bool = False
    where: tuple[tuple[str, str], ...] = ()
    panels: str = ""
    mark: tuple[float, str] | None = None

    def rows(self, claim: str) -> Rows:
        """The rows of the claim that are drawn."""
        return table(f"claims/results/{claim}.csv").where(**dict(self.where))

    def names(self, rows: Rows) -> list[str]:
        """The arms, in the order in which they were run."""
        found = [name for name in dict.fromkeys(row[self.arm] for row in rows.rows) if name != self.against]
        return [name for name in found if not self.arms or name in self.arms]


MEMORY = ("0.79", "0.55", "0.31", "0.08")  # the share of experts among idle parameters, where there are both
PLOTS = {
    "balance": Plot(value="validation_loss", unit="nats per byte, less without balancing", against="none"),
    "branch_train_mix": Plot(
        value="loss_mean", unit="nats per byte, less dense at equal tokens", against="dense, equal tokens",
        arms=(
            "mean of the branches", "merged, rest mean, router trained", "merged, rest mean, all trained",
            "dense, equal FLOPs",
        ),
    ),
    "branch_train_mix_4000": Plot(
        value="loss_mean", unit="nats per byte, less dense at equal tokens", against="dense, equal tokens",
        arms=(
            "merged, rest mean, router trained", "merged, rest mean, all trained", "merged, rest mean, own expert",
            "merged, rest base, router trained", "dense, equal FLOPs",
        ),
    ),
    "demo_balance": Plot(value="validation_loss", unit="nats per byte, less a loss of 0.002", against="loss 0.002"),
    "densemixer": Plot(
        value="loss", unit="nats per byte, less fine-tuning as ever", against="as ever",
        arms=("as ever, other order of data", "as ever, FLOPs of DenseMixer", "frozen router", "DenseMixer"),
    ),
    "harc": Plot(
        value="loss_mean", unit="nats per byte, less merged", against="merged", arms=("merged, routers calibrated",)
    ),
    "mocle_layers_1": Plot(
        value="loss_seen", unit="nats per token of learnt tasks", over="rate", along="learning rate", logarithmic=True
    ),
    "over_sparsity": Plot(
        value="validation_loss", unit="nats per byte, less the dense model", arm="experts", against="1",
        where=(("k", "1"),),
    ),
    "phatgoose": Plot(
        value="loss_own", unit="nats per token of own domains, less uniform", against="uniform, 1/E",
        arms=("retrieved by mean state", "mean activations, k=2", "Arrow, k=3", "PHATGOOSE, k=2", "told the domain"),
        where=(("base", "own"), ("collection", "text-domains")),
    ),
    "phatgoose_400": Plot(
        value="loss_own", unit="nats per token of own domains, less mean activations", against="mean activations, k=2",
        arms=("PHATGOOSE, k=2", "PHATGOOSE with negatives, k=2", "told the domain"), panels="base",
    ),
    "splits": Plot(
        value="loss_after", unit="nats per token, less at random", arm="method", against="random",
        where=(("running", "2"), ("weight", "1.000")),
    ),
    "upcycling": Plot(
        value="loss_at_end", unit="nats per token, less dense", against="dense",
        arms=("one copy", "fresh experts", "copies"),
    ),
    "batch_priority": Plot(
        value="accuracy", unit="points of accuracy, less arrival", arm="priority", against="arrival", over="factor",
        along="capacity factor", logarithmic=True,
    ),
    "census": Plot(
        value="auc_income", unit="AUC of income, less the shared layer", against="shared bottom"
    ),
    "engram": Plot(value="loss", unit="nats per byte, less tables alone", arm="share", against="0.00", arms=MEMORY),
    "collapse": Plot(value="loss", unit="nats per byte at equal training FLOPs, less top-2", against="top-2"),
    "expert_dropout": Plot(value="accuracy", unit="points of accuracy, less 0.1 everywhere", against="0.1"),
    "fine_grained": Plot(value="loss", unit="nats per byte, less 8 experts of top-2", against="8, top-2"),
    "flan_moe": Plot(
        value="loss_left_out", unit="nats per byte of answers to data sets left out, less dense", against="dense"
    ),
    "heterogeneous": Plot(value="loss", unit="nats per byte, less equal widths", against="equal widths"),
    "limoe": Plot(value="dropped_captions", unit="% of caption tokens that no expert takes"),
    "long_text": Plot(
        value="rise", unit="rise of the loss beyond 128 bytes, nats, less the dense model's", against="dense"
    ),
    "makemoe": Plot(
        value="validation_loss", unit="nats per character of tiny Shakespeare", arm="steps", mark=(1.7508, "reported"),
    ),
    "mixtral": Plot(value="loss", unit="nats per byte, less the dense model of the active size", against="active"),
    "mobile_vmoe": Plot(value="accuracy", unit="points of accuracy, less the dense model", against="dense"),
    "multi_gate": Plot(
        value="error", unit="error over variance, less shared", against="shared bottom", over="rho",
        along="cosine of the tasks",
    ),
    "nllb": Plot(value="chrf_small", unit="chrF of languages with few pairs, less sparse", against="sparse"),
    "soft_moe": Plot(value="accuracy", unit="points of accuracy, less top-1", against="top-1"),
    "soft_moe_normalisation": Plot(
        value="accuracy", unit="points, less not normalised", against="not normalised", over="rate",
        along="learning rate", logarithmic=True,
    ),
    "switch_scaling": Plot(value="loss", unit="nats per byte, less the dense model", arm="experts", against="1"),
    "three_modalities": Plot(value="bits", unit="bits of expert and modality", arms=("not told", "told")),
    "z_loss": Plot(
        value="loss", unit="nats per byte", arm="z", over="rate", along="learning rate", logarithmic=True
    ),
    "zero_computation": Plot(value="loss", unit="nats per byte, less the 8 alone", against="8 alone"),
}  # fmt: skip


def draw(claim: str, plot: Plot, folder: Path = IMAGES) -> Path:
    """Draw a claim's picture from its rows.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = plot.rows(claim)
    names = plot.names(rows)
    kinds = list(dict.fromkeys(row[plot.panels] for row in rows.rows)) if plot.panels else [""]
    height = 3.2 if plot.over else 0.9 + 0.35 * len(names)
    figure = Figure(figsize=(6.4, height * len(kinds)), layout="constrained")
    for axis, kind in zip(figure.subplots(len(kinds), squeeze=False).flat, kinds, strict=True):
        part = rows.where(**{plot.panels: kind}) if kind else rows
        (_lines if plot.over else _differences if plot.against else _values)(axis, plot, part, names)
        axis.set_title(f"{plot.panels} {kind}" if kind else "", fontsize=9)
        if plot.mark:
            axis.axvline(plot.mark[0], color=RED, linewidth=1, label=plot.mark[1])
            axis.legend(frameon=False, fontsize=8)
    return save(figure, folder / f"{claim}.svg")


def save(figure: Any, file: Path) -> Path:
    """Write a figure as an SVG file that is the same whenever it is drawn of the same rows."""
    import matplotlib

    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": file.stem, "font.family": "sans-serif"}):
        figure.savefig(file, metadata={"Date": None})
    return file


def _values_of(rows: Rows, column: str) -> list[float]:
    """By seed; of several runs of a seed the last counts."""
    return rows.last("seed").values(column)


def _differences(axis: Any, plot: Plot, rows: Rows, names: Sequence[str]) -> None:
    base = _values_of(rows.where(**{plot.arm: plot.against}), plot.value)
    axis.axvline(0, color=GREY, linewidth=1)
    for at, name in enumerate(reversed(names)):
        values = _values_of(rows.where(**{plot.arm: name}), plot.value)
        _row(axis, at, [a - b for a, b in zip(values, base, strict=True)], interval(values, base))
    _label(axis, plot, names)


def _values(axis: Any, plot: Plot, rows: Rows, names: Sequence[str]) -> None:
    for at, name in enumerate(reversed(names)):
        values = _values_of(rows.where(**{plot.arm: name}), plot.value)
        _row(axis, at, values, interval(values, [0.0] * len(values)))
    _label(axis, plot, names)


def _row(axis: Any, at: int, seeds: Sequence[float], ends: tuple[float, float, float]) -> None:
    low, mean, high = ends
    axis.plot([low, high], [at, at], color=BLUE, linewidth=2, solid_capstyle="round")
    axis.plot(seeds, [at] * len(seeds), "o", color=GREY, markersize=4, alpha=0.8)
    axis.plot([mean], [at], "D", color=BLUE, markersize=6)


def _label(axis: Any, plot: Plot, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), [f"{plot.arm} {n}" if n.isdigit() else n for n in reversed(names)])
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.figure.supxlabel(f"{plot.unit}; mean, 95 % interval and seeds", fontsize=9)


def _lines(axis: Any, plot: Plot, rows: Rows, names: Sequence[str]) -> None:
    places = sorted({float(row[plot.over]) for row in rows.rows})
    if plot.logarithmic:
        axis.set_xscale("log")
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.minorticks_off()
    if plot.against:
        axis.axhline(0, color=GREY, linewidth=1)
    for colour, name in zip(COLOURS, names, strict=False):
        ends = []
        for place in places:
            here = Rows(rows.file, tuple(row for row in rows.rows if float(row[plot.over]) == place))
            values = _values_of(here.where(**{plot.arm: name}), plot.value)
            base = (
                _values_of(here.where(**{plot.arm: plot.against}), plot.value) if plot.against else [0.0] * len(values)
            )
            ends.append(interval(values, base))
        means = [mean for _, mean, _ in ends]
        label = name if plot.arm == "arm" else f"{plot.arm} {name}"
        axis.errorbar(
            places, means, [high - mean for _, mean, high in ends],
            color=colour, capsize=3, marker="o", markersize=4, label=label,
        )  # fmt: skip
    axis.set_xlabel(f"{plot.along or plot.over}; mean and 95 % interval over seeds", fontsize=9)
    axis.set_ylabel(plot.unit, fontsize=9)
    axis.legend(frameon=False, fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", metavar="NAME")
    from common import agreement, overview, scatter

    others = {
        **{claim: partial(scatter.draw, claim, plot) for claim, plot in scatter.SCATTERS.items()},
        "independent": agreement.draw,
    }
    drawings = {claim: partial(draw, claim, plot) for claim, plot in PLOTS.items()} | others
    for claim in parser.parse_args().claims or drawings:
        print(drawings[claim]().relative_to(ROOT))
    print(overview.draw(IMAGES).relative_to(ROOT))


if __name__ == "__main__":
    main()
