"""Draw the roofline of an H200 with the goals of `benchmarks/gpu.py`, and what was measured where there are rows.

Every kernel of a layer takes at least the time of its products and that of its bytes; a layer takes the sum. Gathered
rows are counted once per (token, expert) pair, without credit for the cache, and weights once per pass.

    python benchmarks/gpu_roofline.py               draws docs/images/gpu-roofline.svg, and prints the bounds
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_cases import GOALS, Goal

RESULTS = Path(__file__).parent / "results" / "gpu.csv"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "gpu-roofline.svg"
NOMINAL = (989e12, 4.8e12)
"""FLOP/s in dense bf16 and bytes/s of an H200, as NVIDIA gives them."""
REACHED = (790e12, 4.3e12)
"""What was reached on one H200, measured once."""
OURS = {"triton", "decode"}


@dataclass(frozen=True)
class Kernel:
    """What a kernel multiplies, and what it reads and writes.

    Attributes:
        flops: floating-point operations.
        nbytes: bytes of memory.
    """

    flops: float
    nbytes: float

    def seconds(self, limits: tuple[float, float] = REACHED) -> float:
        """The least time that it can take."""
        return max(self.flops / limits[0], self.nbytes / limits[1])


def forward(goal: Goal) -> list[Kernel]:
    """The kernels of a forward pass in bf16; decoding reads weights and little else."""
    t, d, h, r = goal.tokens, goal.width, goal.hidden, goal.tokens * goal.k
    m, chosen = goal.activation.projections * h, goal.experts * (1 - (1 - goal.k / goal.experts) ** t)
    if goal.microseconds:
        return [Kernel(goal.flops, 2 * chosen * (d * m + d * h))]
    up = Kernel(2 * r * d * m, 2 * (r * d + chosen * d * m + r * m + r * h))
    down = Kernel(2 * r * h * d, 2 * (r * h + chosen * d * h + r * d))
    return [up, down, Kernel(0, 2 * (r * d + t * d))]


def backward(goal: Goal) -> list[Kernel]:
    """The kernels of a backward pass in bf16."""
    t, d, h, r, e = goal.tokens, goal.width, goal.hidden, goal.tokens * goal.k, goal.experts
    m = goal.activation.projections * h
    hidden = Kernel(2 * r * h * d, 2 * (r * d + e * d * h + 2 * r * m + r * h))
    of_down = Kernel(2 * r * h * d, 2 * (r * d + r * h + e * d * h))
    of_up = Kernel(2 * r * m * d, 2 * (r * m + r * d + e * d * m))
    dx = Kernel(2 * r * m * d, 2 * (r * m + e * d * m + r * d))
    return [hidden, of_down, of_up, dx, Kernel(0, 2 * (r * d + t * d))]


def intensity(kernels: Sequence[Kernel]) -> float:
    """FLOPs per byte."""
    return sum(kernel.flops for kernel in kernels) / sum(kernel.nbytes for kernel in kernels)


def passes(goal: Goal) -> dict[str, list[Kernel]]:
    """The kernels of every pass that is timed."""
    both = {} if goal.microseconds else {"forward+backward": forward(goal) + backward(goal)}
    return {"forward": forward(goal)} | both


def bound(kernels: Sequence[Kernel]) -> tuple[float, float]:
    """Milliseconds and TFLOP/s that such kernels, one after another, cannot beat."""
    seconds = sum(kernel.seconds() for kernel in kernels)
    return 1e3 * seconds, sum(kernel.flops for kernel in kernels) / seconds / 1e12


def wanted(goal: Goal) -> dict[str, float]:
    """The goal of every pass in TFLOP/s."""
    decoding = goal.flops / goal.microseconds / 1e6 if goal.microseconds else 0
    goals = {"forward": goal.forward or decoding, "forward+backward": goal.both}
    return {name: tflops for name, tflops in goals.items() if tflops}


def measured(file: Path = RESULTS) -> list[dict[str, str]]:
    """The last row of every goal, pass, implementation and device."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        key = ("goal", "pass", "implementation", "device")
        return list({tuple(row[column] for column in key): row for row in csv.DictReader(lines)}.values())


def draw(rows: list[dict[str, str]], file: Path = PICTURE) -> None:
    """The roofline: decoding beside whole blocks; bounds are bars, goals rings, what was measured dots and crosses."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    decoding, blocks = figure.subplots(1, 2)
    _roof(decoding, "decoding", (0.7, 4), (1, 25), (1, 2, 3), (1, 2, 5, 10, 20))
    _roof(blocks, "whole blocks", (110, 2500), (200, 1150), (200, 500, 1000, 2000), (200, 300, 400, 600, 800, 1000))
    decoding.set_ylabel("TFLOP/s")
    for goal in GOALS:
        _goal(decoding if goal.microseconds else blocks, goal, [row for row in rows if row["goal"] == goal.name])
    devices = ", ".join(sorted({row["device"] for row in rows}))
    title = f"Measured on {devices}" if rows else "Limits and goals: no GPU has measured these kernels yet"
    figure.suptitle(title, fontsize=10)
    legend: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        legend |= dict(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "moeify", "svg.fonttype": "none"}):  # the same picture is the same file
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def _roof(
    axis: Any, title: str, x: tuple[float, float], y: tuple[float, float], x_ticks: tuple, y_ticks: tuple
) -> None:
    for (flops, nbytes), style, label in (
        (NOMINAL, "-", "H200: 4.8 TB/s, 989 TFLOP/s in bf16"),
        (REACHED, "--", "reached on one: 4.3 TB/s, 790 TFLOP/s"),
    ):
        places = sorted({*x, min(max(flops / nbytes, x[0]), x[1])})
        axis.plot(places, [min(flops, i * nbytes) / 1e12 for i in places], style, color="black", label=label)
    axis.set(xscale="log", yscale="log", xlim=x, ylim=y, xlabel="FLOP per byte", title=title)
    axis.set_xticks(x_ticks, list(map(str, x_ticks)))
    axis.set_yticks(y_ticks, list(map(str, y_ticks)))
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _goal(axis: Any, goal: Goal, rows: list[dict[str, str]]) -> None:
    goals, lowest, place = wanted(goal), float("inf"), 0.0
    for (which, kernels), colour in zip(passes(goal).items(), ("tab:blue", "tab:orange"), strict=False):
        place, (_, highest) = intensity(kernels), bound(kernels)
        lowest = min(lowest, goals.get(which, highest))
        axis.plot(place, highest, "_", color=colour, markersize=12, label=f"bound, {which}")
        if which in goals:
            axis.plot((place, place), (goals[which], highest), color=colour, alpha=0.3)
            axis.plot(place, goals[which], "o", color=colour, fillstyle="none", label=f"goal, {which}")
        for row in rows:
            if row["pass"] == which:
                marker, label = ("o", "measured") if row["implementation"] in OURS else ("x", "peers")
                axis.plot(place, float(row["tflops"]), marker, color=colour, label=f"{label}, {which}")
                lowest = min(lowest, float(row["tflops"]))
    axis.set_ylim(bottom=min(axis.get_ylim()[0], 0.8 * lowest))
    below = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center", "fontsize": 8}
    axis.annotate(goal.name, (place, lowest), **below)


if __name__ == "__main__":
    draw(measured())
    for each in GOALS:
        for name, kernels in passes(each).items():
            ms, tflops = bound(kernels)
            print(f"{each.name:8s} {name:16s} at least {ms:.3g} ms, at most {tflops:.0f} TFLOP/s")
