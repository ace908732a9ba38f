"""Panel: load violation (MaxVio), dead experts and router entropy of every layer over the steps of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.inspect.panels.charts import Choice, Heatmap, Lines, Stack
from moeify.inspect.panels.counting import short_names
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table

_BINS = 96
_UNITS = {
    "max_vio": "MaxVio", "dead_experts": "dead experts", "load_entropy": "load entropy / log E",
    "router_entropy": "router entropy / log E", "drop_rate": "share dropped", "balance": "balance, 1 is even",
}  # fmt: skip


def over_training(log: Sequence[Mapping[str, Any]]) -> Panel:
    """What `SparseTrainer` wrote into `metrics.jsonl`, by step and layer.

    Args:
        log: its lines.

    Raises:
        NotMeasured: no line has metrics of layers.
    """
    lines = [line for line in log if line.get("layers")]
    if len(lines) < 2:
        raise NotMeasured("the log of the training has no figures of its layers")
    layers = list(lines[0]["layers"])
    size = -(-len(lines) // _BINS)
    steps = [int(part[-1]["step"]) for part in _parts(lines, size)]
    charts, means = {}, {}
    for kind, unit in _UNITS.items():
        table = torch.tensor([[line["layers"].get(x, {}).get(kind, torch.nan) for line in lines] for x in layers])
        if bool(table.isnan().all()):
            continue
        binned = torch.stack([part.nanmean(1) for part in table.split(size, dim=1)], dim=1)
        means[kind] = binned.nanmean(0)
        picture = Heatmap(values=binned, rows=short_names(layers), columns=[*map(str, steps)], column="step", unit=unit)
        mean = Lines(
            x=[*map(float, steps)], series={"mean over layers": binned.nanmean(0).tolist()}, x_label="step",
            y_label=f"{unit}, band: all layers",
            band={"mean over layers": (_least(binned).tolist(), (-_least(-binned)).tolist())},
        )  # fmt: skip
        charts[unit] = Stack([mean, picture])
    rows = [(step, *(round(float(values[i]), 4) for values in means.values())) for i, step in enumerate(steps)]
    notes = (f"{len(lines)} lines of the log in bins of {size}, each the mean.",) if size > 1 else ()
    return Panel(
        title="Training over time",
        question="How did load balance and router confidence of every layer change over the steps of training?",
        picture=Choice(label="figure", charts=charts),
        table=Table(("step", *(_UNITS[kind] for kind in means)), rows),
        advice=_advice(means, steps), notes=notes,
    )  # fmt: skip


def _parts(lines: list[Mapping[str, Any]], size: int) -> list[list[Mapping[str, Any]]]:
    return [lines[start : start + size] for start in range(0, len(lines), size)]


def _least(values: Float[Tensor, "L S"]) -> Float[Tensor, "S"]:
    """The smallest over the layers, ignoring unknown values."""
    return values.nan_to_num(torch.inf).amin(0)


def _advice(means: dict[str, Float[Tensor, "S"]], steps: list[int]) -> Advice:
    if "max_vio" not in means:
        return Advice(
            level="unknown", finding="The log has no MaxVio.", action="Train with SparseTrainer or RoutingCallback.",
            gain="figures by layer", source="moeify.train",
        )  # fmt: skip
    violation = means["max_vio"]
    first, last = (
        float(violation[: max(1, len(violation) // 10)].mean()),
        float(violation[-max(1, len(violation) // 10) :].mean()),
    )
    finding = f"Over {steps[-1]} steps MaxVio went from {first:.2f} to {last:.2f}, in the mean over layers."
    if "dead_experts" in means and float(means["dead_experts"][-1]) > 0:
        finding += f" At the end {float(means['dead_experts'][-1]):.1f} experts per layer are dead."
    if last > max(1.0, 1.5 * first):
        return Advice(
            level="act", finding=finding,
            action="Balance gets worse as it trains: add a controller (moeify.balance.Proportional), or raise the "
            "balance "
            "loss, from the last checkpoint on.",
            gain="the demo's busiest expert went from 3.8 times its fair share to 1.12, at the same loss within noise",
            source="claims/results/demo_balance.csv",
        )  # fmt: skip
    return Advice(
        level="fine",
        finding=finding,
        action="Nothing; the balance holds.",
        gain="none",
        source="metrics.jsonl of the run",
    )
