"""Pictures of a run, drawn with matplotlib (the extra `moeify[report]`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeify.evaluate.run import Run
from moeify.evaluate.verdict import axis_names
from moeify.evaluate.versus import Versus
from moeify.inspect.load import ExpertLoad
from moeify.inspect.page import printable


def draw_losses(versus: Versus, file: Path) -> None:
    """Validation loss over tokens, training FLOPs and seconds by the measured pace, one line per run.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure(3, (12, 3.6))
    sparse, dense = versus.curves()
    seconds = f"{axis_names(versus)['seconds']} of training (s)"
    for axis, quantity, label in zip(
        axes,
        ("tokens", "flops", "seconds"),
        (f"training {versus.units.pieces}", "training FLOPs", seconds),
        strict=True,
    ):
        for runs, colour in ((sparse, "tab:blue"), (dense, "tab:orange")):
            for i, run in enumerate(runs):
                _line(axis, run, quantity, colour, run.name if i == 0 else None)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    runs = [*sparse, *dense]
    lowest, highest = min(run.points[-1].loss for run in runs), max(run.points[1].loss for run in runs)
    margin = max(0.01, 0.05 * (highest - lowest))
    for axis in axes:  # without the first point, whose loss would compress the rest of the curve
        axis.set_ylim(lowest - margin, highest + margin)
    axes[0].set_ylabel(f"validation loss ({versus.units.loss})")
    axes[0].legend()
    figure.savefig(file, dpi=120)


def _line(axis: Any, run: Run, quantity: str, colour: str, label: str | None) -> None:
    x = [getattr(point, quantity) for point in run.points]
    axis.plot(x, [point.loss for point in run.points], color=colour, label=label, marker=".", alpha=0.8)


def draw_load(load: ExpertLoad, file: Path) -> None:
    """Share of every expert in every layer, and for each domain in the last layer.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure(2, (12, 1.2 + 0.35 * max(len(load.layers), len(load.domains))))
    by_domain = load.rows / load.rows.sum(-1, keepdim=True)
    even = 1 / load.rows.shape[-1]
    for axis, table, names, title in (
        (axes[0], load.share, load.layers, "by layer"),
        (axes[1], by_domain[-1], load.domains, f"by domain, in {load.layers[-1]}"),
    ):
        image = axis.imshow(
            table.tolist(), aspect="auto", cmap="viridis", vmin=0, vmax=max(3 * even, float(table.max()))
        )
        axis.set_yticks(range(len(names)), [printable(name) for name in names], fontsize=8, parse_math=False)
        axis.set_xlabel("expert")
        axis.set_title(printable(f"share of rows {title}"), fontsize=10, parse_math=False)
        figure.colorbar(image, ax=axis)
    figure.savefig(file, dpi=120)


def _figure(columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib; install it with: pip install 'moeify[report]'") from None
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, columns)
