"""Panel: the distance between the last expert that is chosen and the first that is not."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.inspect.panels.charts import Lines
from moeify.inspect.panels.counting import labels, quantiles
from moeify.inspect.panels.entropy import scored
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table
from moeify.inspect.trace import LayerTrace, Trace

CLOSE = 1 / 256
"""Relative difference of two scores that bfloat16, with its 8 bits, cannot distinguish."""


def margin(trace: Trace) -> Panel:
    """Relative margin (s_k - s_k+1) / s_k of the K-th and the next score, by layer.

    Raises:
        NotMeasured: the trace has no scores, or every expert is chosen.
    """
    layers = [layer for layer in scored(trace) if layer.k < layer.num_experts and len(_margin(layer))]
    if not layers:
        raise NotMeasured("no token has an expert that is not chosen, or scores below it that half precision can hold")
    names = labels(layers)
    margins = {layer.name: _margin(layer) for layer in layers}
    found = {name: quantiles(values, 0.1, 0.5, 0.9) for name, values in margins.items()}
    ties = {name: float((values < CLOSE).float().mean()) for name, values in margins.items()}
    low, middle, high = ([q[i] for q in found.values()] for i in range(3))
    rows = [(names[name], *(round(v, 4) for v in found[name]), f"{ties[name]:.2%}") for name in names]
    return Panel(
        title="Margin",
        question="How close was the choice? The score of the last expert chosen minus that of the next, over the "
        "former.",
        picture=Lines(
            x=list(names.values()), series={"median": middle}, band={"median": (low, high)}, x_label="layer",
            y_label="relative margin, band: middle 80% of the tokens",
        ),
        table=Table(("layer", "10%", "median", "90%", "below 1/256"), rows),
        advice=_advice(ties),
    )  # fmt: skip


def _margin(layer: LayerTrace) -> Float[Tensor, "T"]:
    """Of every token; not of those whose K-th score is so small that half precision, as traces have it, rounds it."""
    assert layer.scores is not None
    last, following = layer.scores.float().topk(layer.k + 1, dim=-1).values[:, -2:].unbind(1)
    known = last.abs() >= torch.finfo(torch.half).tiny
    return ((last - following) / last.abs())[known]


def _advice(ties: dict[str, float]) -> Advice:
    worst = max(ties, key=ties.__getitem__)
    finding = (
        f"In {worst}, {ties[worst]:.1%} of the choices are closer than bfloat16 resolves, in the mean over layers "
    )
    finding += f"{sum(ties.values()) / len(ties):.1%}."
    if ties[worst] < 0.05:
        return Advice(
            level="fine", finding=finding, action="Nothing; rounding changes few choices.", gain="none",
            source="8 bits of bfloat16: 1/256",
        )  # fmt: skip
    return Advice(
        level="look", finding=finding,
        action="Compute the router in fp32, in training and in serving, and replay recorded decisions in RL "
        "(moeify.replay).",
        gain="12.6 points of SWE-bench Verified in the one case that published a number",
        source="SGLang issue 38695, a router in half precision",
    )  # fmt: skip
