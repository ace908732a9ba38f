"""Draw results: measured points, and the roofline beside them."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

Rows = list[dict[str, str]]


def draw_scaling(rows: Rows, file: Path) -> None:
    """Time of a layer over its number of experts, a panel per number of tokens."""
    counts = sorted({int(row["tokens"]) for row in rows})
    figure = Figure(figsize=(3.3 * len(counts), 3.6), layout="constrained")
    for axis, tokens in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts, strict=True):
        here = [row for row in rows if int(row["tokens"]) == tokens]
        sparse = [row for row in here if int(row["experts"]) > 1]
        theirs = [row for row in sparse if row["implementation"].startswith("transformers")]
        for label, found, colour in (
            ("best of transformers", theirs, "tab:orange"),
            ("moeify", _named(sparse, "moeify"), "tab:blue"),
            ("moeify, packed weights", _named(sparse, "moeify/packed"), "tab:cyan"),
        ):
            _points(axis, found, "experts", "median_ms", min, colour, label)
        _points(axis, sparse, "experts", "limit_ms", median, "black", "roofline", style="--", marker="")
        dense = _named(here, "dense")
        if dense:
            axis.axhline(float(dense[0]["median_ms"]), color="tab:green", label="dense network of equal active size")
        _logarithmic(axis, sorted({int(row["experts"]) for row in sparse}))
        axis.set_title(f"{tokens} token{'s' if tokens > 1 else ''}", fontsize=10)
        axis.set_xlabel("experts, of which 2 are active")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("milliseconds")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    _save(figure, file)


def draw_roofline(rows: Rows, file: Path) -> None:
    """Tokens per second of whole models over the batch."""
    figure = Figure(figsize=(7.5, 5.4), layout="constrained")
    axis = figure.subplots()
    colours = zip(dict.fromkeys(row["model"] for row in rows), ("tab:blue", "tab:orange", "tab:green"), strict=False)
    for model, colour in colours:
        here = [row for row in rows if row["model"] == model]
        theirs = [row for row in here if row["implementation"].startswith("transformers")]
        _points(axis, _named(here, "moeify"), "batch", "tok_per_s", max, colour, f"{model}, moeify")
        _points(
            axis, theirs, "batch", "tok_per_s", max, colour, f"{model}, transformers", style="-", marker="x", alpha=0.5
        )
        _points(axis, here, "batch", "memory_limit", median, colour, f"{model}, memory allows", style="--", marker="")
        _points(axis, here, "batch", "product_limit", median, colour, f"{model}, products allow", style=":", marker="")
    _logarithmic(axis, sorted({int(row["batch"]) for row in rows}))
    axis.set_xlabel("sequences decoded at once")
    axis.set_ylabel("tokens per second, all sequences")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    _save(figure, file)


def _named(rows: Rows, implementation: str) -> Rows:
    return [row for row in rows if row["implementation"] == implementation]


def _points(
    axis: Any, rows: Rows, x: str, y: str, best: Any, colour: str, label: str,
    *, style: str = "-", marker: str = "o", alpha: float = 1,
) -> None:  # fmt: skip
    """A line through the best of the rows at every x."""
    places = sorted({int(row[x]) for row in rows})
    values = [best(float(row[y]) for row in rows if int(row[x]) == place) for place in places]
    axis.plot(places, values, style, color=colour, label=label, marker=marker, alpha=alpha)


def _logarithmic(axis: Any, places: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(places, list(map(str, places)))
    axis.set_yscale("log")
    for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        formatter(LogFormatter())


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
