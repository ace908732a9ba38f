"""Panel: super experts: the few whose outputs have outliers on which the whole model depends."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moeify.inspect.measurements import outliers
from moeify.inspect.measurements.outliers import MASSIVE, Outputs
from moeify.inspect.panels.charts import Heatmap
from moeify.inspect.panels.counting import padded, short, short_names
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table


def super_experts(outputs: Mapping[str, Outputs]) -> Panel:
    """The largest output of every expert over the median magnitude of its layer, and which experts are super-experts.

    Raises:
        NotMeasured: no expert's outputs were seen.
    """
    if not outputs:
        raise NotMeasured("the experts of this model cannot be called one by one, so their outputs are not known")
    names = dict(zip(outputs, short_names([*outputs]), strict=True))
    ratios = {name: found.peak / max(found.median, 1e-30) for name, found in outputs.items()}
    found = outliers.super_experts(outputs)
    super_rows = [(name, expert) for name, which in found.items() for expert in which]
    largest = {name: int(ratio.nan_to_num(-1).argmax()) for name, ratio in ratios.items()}
    shown = [*super_rows, *(pair for pair in largest.items() if pair not in super_rows)]
    rows = [
        (
            names[name], expert, "yes" if (name, expert) in super_rows else "no",
            round(float(outputs[name].peak[expert]), 3), f"×{float(ratios[name][expert]):,.0f}",
        )
        for name, expert in shown
    ]  # fmt: skip
    return Panel(
        title="Super experts",
        question="Does the model depend on outliers in the outputs of a few experts?",
        picture=Heatmap(
            values=padded([*ratios.values()]), rows=list(names.values()),
            unit="times the median magnitude of the layer's outputs", digits=0, blank="no token, or no such expert",
        ),
        table=Table(("layer", "expert", "super expert", "largest output", "over the median"), rows),
        advice=_advice(super_rows, ratios),
        notes=("The table has all super experts, and of every other layer the expert with the largest output.",),
    )  # fmt: skip


def _advice(found: list[tuple[str, int]], ratios: Mapping[str, torch.Tensor]) -> Advice:
    experts = sum(int(ratio.isfinite().sum()) for ratio in ratios.values())
    peak = max(float(ratio.nan_to_num(0).max()) for ratio in ratios.values())
    if not found:
        return Advice(
            level="fine",
            finding=f"The largest output is {peak:,.0f} times the median magnitude of its layer; none of {experts} "
            "experts is a super expert.",
            action="Nothing.", gain="none",
            source=f"arXiv 2507.23279: the first three quarters of the layers; massive is {MASSIVE:,} times the "
            "median, arXiv 2402.17762",
        )  # fmt: skip
    places = short([f"{expert} in {name}" for name, expert in found])
    largest = max(float(ratios[name][expert]) for name, expert in found)
    return Advice(
        level="act",
        finding=f"{len(found)} of {experts} experts have outputs up to {largest:,.0f} times the median magnitude: "
        f"{places}.",
        action="Never prune, merge or coarsely quantise these experts; leave them out of every list that a score of "
        "load gives.",
        gain="pruning 3 of 6,144 experts made Qwen3-30B-A3B repeat itself; keeping them costs almost nothing",
        source="arXiv 2507.23279",
    )  # fmt: skip
