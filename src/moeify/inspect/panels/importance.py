"""Panel: the sum of router weights that each expert gets, beside its number of tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.inspect.panels.charts import Heatmap
from moeify.inspect.panels.counting import ENOUGH, labels, padded, rows_per_expert, shares, short
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table
from moeify.inspect.panels.unclear import too_little
from moeify.inspect.trace import LayerTrace, Trace


def importance(trace: Trace) -> Panel:
    """Sum of the weights of every expert over the mean of all (Shazeer et al., arXiv 1701.06538, eq. 6).

    Raises:
        NotMeasured: the trace has no weights.
    """
    layers = [layer for layer in trace if layer.k and layer.weights is not None]
    if not layers:
        raise NotMeasured("the trace has no router weights; record it from the model by moeify trace")
    sums = [_importance(layer) for layer in layers]
    names = labels(layers)
    ratios = [weight / rows.clamp_min(1e-9) for weight, rows in zip(sums, map(_loads, layers), strict=True)]
    rows = [
        (names[layer.name], round(_cv2(weight), 3), int(weight.argmax()), round(float(weight.max()), 2))
        for layer, weight in zip(layers, sums, strict=True)
    ]
    quiet = [
        f"{int((ratio.masked_fill(weight == 0, 9) < 0.5).sum())} in {layer.name}"
        for layer, ratio, weight in zip(layers, ratios, sums, strict=True)
        if bool((ratio.masked_fill(weight == 0, 9) < 0.5).any())
    ]
    return Panel(
        title="Importance",
        question="How much weight does the router give to each expert in all? 1 is the mean of its layer.",
        picture=Heatmap(
            values=padded(sums), rows=list(names.values()), unit="times the mean importance", scale="ratio"
        ),
        table=Table(("layer", "CV²", "most important expert", "its importance"), rows),
        advice=_advice(quiet, layers),
    )


def _importance(layer: LayerTrace) -> Float[Tensor, "E"]:
    there = layer.experts >= 0
    assert layer.weights is not None
    sums = torch.zeros(layer.num_experts).index_add(0, layer.experts[there].long(), layer.weights[there].float())
    return sums / sums.mean().clamp_min(1e-9)


def _loads(layer: LayerTrace) -> Float[Tensor, "E"]:
    return shares(layer.assigned)


def _cv2(values: Float[Tensor, "E"]) -> float:
    """The squared coefficient of variation: 0 is even."""
    return float(values.var(correction=0) / values.mean().square().clamp_min(1e-12))


def _advice(quiet: list[str], layers: list[LayerTrace]) -> Advice:
    worst = max(layers, key=lambda layer: _cv2(_importance(layer)))
    finding = f"CV² of the importance is largest in {worst.name}, {_cv2(_importance(worst)):.2f}."
    if (rows := rows_per_expert(layers)) < ENOUGH:
        return too_little(finding, rows)
    if quiet:
        return Advice(
            level="look",
            finding=f"{finding} Experts with less than half the weight that their tokens would give: {short(quiet)}.",
            action="Take these first when you prune or lower the precision: they are often chosen and count for "
            "little. "
            "Score them by weight times output norm (REAP), not by how often they are chosen.",
            gain="a mean loss of 1.9% at half of the experts by REAP",
            source="Cerebras REAP, arXiv 2510.13999, renormalised weights",
        )  # fmt: skip
    return Advice(
        level="fine", finding=f"{finding} Every expert has the weight that its number of tokens would give.",
        action="Nothing; the load shows the same.", gain="none", source="the importance follows the load here",
    )  # fmt: skip
