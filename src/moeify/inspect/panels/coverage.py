"""Panel: how few experts compute most of the rows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moeify import statistics
from moeify.inspect.panels.charts import Lines
from moeify.inspect.panels.counting import ENOUGH, choosing, labels, rows_per_expert
from moeify.inspect.panels.panel import Advice, Panel, Table
from moeify.inspect.panels.unclear import too_little
from moeify.inspect.trace import LayerTrace, Trace


def coverage(trace: Trace) -> Panel:
    """The share of the rows that the most used experts take together.

    Raises:
        NotMeasured: no layer sends tokens to experts.
    """
    layers = choosing(trace)
    short = labels(layers)
    curves = {layer.name: _curve(layer) for layer in layers}
    at = torch.linspace(0, 1, 33)
    drawn = torch.stack([_at(curve, at) for curve in curves.values()])
    need = {name: [_experts(curve, part) for part in (0.5, 0.8, 0.95)] for name, curve in curves.items()}
    rows = [(short[x.name], x.num_experts, *need[x.name]) for x in layers]
    return Panel(
        title="Coverage",
        question="Which share of the rows do the most used experts take, and how many are needed for most of them?",
        picture=Lines(
            x=at.tolist(), x_label="share of the experts, most used first", y_label="share of the rows, band: all "
            "layers",
            series={"mean over layers": drawn.mean(0).tolist(), "even load": at.tolist()},
            band={"mean over layers": (drawn.amin(0).tolist(), drawn.amax(0).tolist())},
        ),
        table=Table(("layer", "experts", "for 50% of the rows", "80%", "95%"), rows),
        advice=_advice(layers, need),
    )  # fmt: skip


def _curve(layer: LayerTrace) -> Float[Tensor, "E"]:
    return statistics.load(layer.assigned).sort(descending=True).values.cumsum(0)


def _at(curve: Float[Tensor, "E"], at: Float[Tensor, "points"]) -> Float[Tensor, "points"]:
    """The curve between its points."""
    whole = torch.cat([torch.zeros(1), curve])
    place = at * len(curve)
    low = place.floor().long().clamp_max(len(curve) - 1)
    return whole[low] + (place - low) * (whole[low + 1] - whole[low])


def _experts(curve: Float[Tensor, "E"], part: float) -> int:
    return int((curve < part - 1e-6).sum()) + 1


def _advice(layers: list[LayerTrace], need: dict[str, list[int]]) -> Advice:
    share = sum(need[layer.name][1] / layer.num_experts for layer in layers) / len(layers)
    finding = f"80% of the rows need {share:.0%} of the experts, in the mean over layers; an even load needs 80%."
    if (rows := rows_per_expert(layers)) < ENOUGH:
        return too_little(finding, rows)
    if share > 0.65:
        return Advice(
            level="fine", finding=finding, action="Do not prune by how often experts are chosen, and cache by recency, "
            "not by count.",
            gain="none: an even load has no cold experts", source="counted here",
        )  # fmt: skip
    return Advice(
        level="look", finding=finding,
        action=f"Keep the most used {share:.0%} of every layer in fast memory and stream the rest; fine-tune only "
        "these "
        "(ESFT). Prune only by a score that knows the outputs (REAP), on your own text.",
        gain=f"80% of the rows with {share:.0%} of the expert memory; pruning half by REAP kept 99.8% of GSM8K for "
        "Qwen3-30B and 17% for Moonlight-16B: measure yours",
        source="counted here; llm-compressor 0.14, examples/reap_expert_pruning",
    )  # fmt: skip
