"""The picture of all claims whose measure is a loss: the method less its baseline, one row per claim."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.plots import GREY, save
from common.statistics import T_95, interval
from figures.rows import table
from figures.texts import ROOT

COLOURS = {"reproduced": "#2166ac", "in part": "#8073ac", "failed": "#d6604d"}
Where = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """A claim's method and its baseline: which rows, and the column of the loss."""

    claim: str
    label: str
    method: Where
    baseline: Where
    column: str = "loss"

    def ends(self) -> tuple[float, float, float]:
        """Lower end of the 95 % interval of the difference, mean and upper end."""
        rows = table(f"claims/results/{self.claim}.csv")
        sides = (rows.where(**side).last("seed") for side in (self.method, self.baseline))
        one, other = ({row["seed"]: float(row[self.column]) for row in side.rows} for side in sides)
        return interval([one[seed] for seed in one], [other[seed] for seed in one])


PAIRS = (
    Pair("over_sparsity", "64 experts, equal FLOPs", {"k": 4, "experts": 64}, {"experts": 1}, "validation_loss"),
    Pair("upcycling", "upcycling, equal tokens", {"arm": "copies"}, {"arm": "dense"}, "loss_at_end"),
    Pair("densemixer", "DenseMixer, equal tokens", {"arm": "DenseMixer"}, {"arm": "as ever"}),
    Pair("harc", "calibrated routers", {"arm": "merged, routers calibrated"}, {"arm": "merged"}, "loss_mean"),
    Pair("fine_grained", "32 finer experts", {"arm": "32, top-8"}, {"arm": "8, top-2"}),
    Pair("heterogeneous", "HMoE, under half the work", {"arm": "unequal widths, penalty"}, {"arm": "equal widths"}),
    Pair("mixtral", "top-2 of 8, equal FLOPs", {"arm": "sparse"}, {"arm": "active"}),
    Pair("collapse", "X-MoE, equal FLOPs", {"arm": "X-MoE"}, {"arm": "top-2"}),
    Pair("collapse", "CompeteSMoE, equal FLOPs", {"arm": "CompeteSMoE"}, {"arm": "top-2"}),
    Pair("collapse", "MH-MoE, equal FLOPs", {"arm": "MH-MoE"}, {"arm": "top-2"}),
    Pair("switch_scaling", "Switch, 8 experts", {"experts": 8}, {"experts": 1}),
    Pair(
        "mocle", "MoCLE, learnt tasks", {"arm": "MoCLE", "rate": "0.003"}, {"arm": "one adapter", "rate": "0.01"},
        "loss_seen",
    ),
    Pair(
        "branch_train_mix", "Branch-Train-MiX", {"arm": "merged, rest mean, all trained"},
        {"arm": "dense, equal tokens"}, "loss_mean",
    ),
    Pair("zero_computation", "MoE++, a quarter fewer calls", {"arm": "MoE++"}, {"arm": "8 alone"}),
)  # fmt: skip


def verdict(claim: str) -> str:
    """The result that docs/claims.md gives."""
    page = (ROOT / "docs/claims.md").read_text("utf-8")
    return re.search(rf"\(`{claim}\.py`\) \|[^|]*\| \*\*([\w ]+)\*\*", page)[1]


def demo() -> tuple[float, float, float]:
    """Of the demo at equal tokens, of which mean and standard deviation over seeds are kept."""
    row = table("claims/results/demo.csv").where(first_seed=31, at_equal="tokens").rows[0]
    mean, half = float(row["difference"]), T_95[int(row["seeds"])] * float(row["spread"]) / math.sqrt(int(row["seeds"]))
    return mean - half, mean, mean + half


def draw(folder: Path) -> Path:
    """Draw the picture."""
    from matplotlib.figure import Figure

    shown = [("sparse Llama, equal tokens", demo(), verdict("demo"))]
    shown += [(pair.label, pair.ends(), verdict(pair.claim)) for pair in PAIRS]
    shown.sort(key=lambda each: each[1][1], reverse=True)
    figure = Figure(figsize=(7.2, 0.9 + 0.3 * len(shown)), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color=GREY, linewidth=1)
    for at, (_, (low, mean, high), result) in enumerate(shown):
        axis.plot([low, high], [at, at], color=COLOURS[result], linewidth=2, solid_capstyle="round")
        axis.plot([mean], [at], "D", color=COLOURS[result], markersize=6)
    for result, colour in COLOURS.items():
        if any(each[2] == result for each in shown):
            axis.plot([], [], "D-", color=colour, label=result)
    axis.legend(frameon=False, fontsize=9, loc="upper right", title="the claim is")
    axis.set_yticks(range(len(shown)), [label for label, _, _ in shown])
    figure.supxlabel(
        "loss less that of the baseline in nats: mean, 95 % interval over seeds; left is better", fontsize=9
    )
    return save(figure, folder / "overview.svg")
