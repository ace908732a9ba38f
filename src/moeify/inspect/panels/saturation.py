"""Panel: router saturation and drift: how early in training the router made the last checkpoint's choices."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.inspect.panels.charts import Heatmap, Lines, Stack
from moeify.inspect.panels.counting import choosing, labels
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table
from moeify.inspect.trace import LayerTrace, Trace


def saturation(traces: Mapping[int, Trace]) -> Panel:
    """The share of the last checkpoint's experts that earlier ones chose too, on the same tokens (arXiv 2409.02060).

    Args:
        traces: of the same tokens, by the step of the checkpoint.

    Raises:
        NotMeasured: fewer than two checkpoints.
    """
    steps = sorted(traces)
    if len(steps) < 2:
        raise NotMeasured("saturation needs the checkpoints of two steps or more; save them in training")
    last = {layer.name: layer for layer in choosing(traces[steps[-1]])}
    names = labels([*last.values()])
    table = torch.tensor([
        [shared(traces[step].layers[name], layer) for step in steps[:-1]] for name, layer in last.items()
    ])  # fmt: skip
    drift = torch.tensor([
        [1 - shared(traces[a].layers[n], traces[b].layers[n]) for a, b in itertools.pairwise(steps)]
        for n in last
    ])  # fmt: skip
    chance = sum(layer.k / layer.num_experts for layer in last.values()) / len(last)
    columns = [str(step) for step in steps[:-1]]
    rows = [
        (
            step,
            round(float(table[:, i].mean()), 3),
            round(float(table[:, i].min()), 3),
            round(float(drift[:, i].mean()), 3),
        )
        for i, step in enumerate(steps[:-1])
    ]
    lines = Lines(
        x=[float(step) for step in steps[:-1]], x_label="step", y_label="share of experts",
        series={
            "saturation": table.mean(0).tolist(), "drift to the next checkpoint": drift.mean(0).tolist(),
            "chance": [chance] * (len(steps) - 1),
        },
        band={"saturation": (table.amin(0).tolist(), table.amax(0).tolist())},
    )  # fmt: skip
    heatmap = Heatmap(values=table, rows=[*names.values()], columns=columns, column="step", unit="of the last experts")
    return Panel(
        title="Saturation and drift",
        question="When in training did the router settle? 1: the checkpoint chose as the last one does.",
        picture=Stack([lines, heatmap]) if len(steps) > 2 else heatmap,
        table=Table(("step", "saturation", "lowest layer", "changed at the next checkpoint"), rows),
        advice=_advice(steps, table, drift, chance),
    )


def shared(one: LayerTrace, last: LayerTrace) -> float:
    """Mean over tokens of the share of the last decision's experts that another one has too.

    Raises:
        ValueError: traces of different numbers of tokens.
    """
    if len(one.experts) != len(last.experts):
        raise ValueError(
            f"checkpoints saw {len(one.experts)} and {len(last.experts)} tokens in {last.name}; trace the same text"
        )
    there = last.experts >= 0
    same = (last.experts.unsqueeze(2) == one.experts.unsqueeze(1)).any(2) & there
    return float((same.sum(1) / there.sum(1).clamp_min(1))[there.any(1)].mean())


def _advice(steps: list[int], table: Float[Tensor, "L C"], drift: Float[Tensor, "L C"], chance: float) -> Advice:
    first, moved = float(table[:, 0].mean()), float(drift[:, -1].mean())
    finding = f"At step {steps[0]} the router made {first:.0%} of the choices of step {steps[-1]}, "
    finding += f"{chance:.0%} by chance; between the last two checkpoints {moved:.0%} of the experts changed."
    if moved > 0.3:
        return Advice(
            level="look", finding=finding,
            action="Train on, or lower the learning rate of the router, before you prune, place or name experts: their "
            "roles still change.",
            gain="OLMoE had made about 60% of its last choices after 1% of its training, 80% after 40 "
            "%", source="arXiv 2409.02060, "
            "figure 18",
        )  # fmt: skip
    return Advice(
        level="fine", finding=finding,
        action="The router has settled: freeze it (moeify.train.freeze), and decide about pruning and placement now.",
        gain="no router gradient to compute; StableMoE froze its router after 20% of the steps", source="arXiv "
        "2204.08396",
    )  # fmt: skip
