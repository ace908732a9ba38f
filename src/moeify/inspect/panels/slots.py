"""Panel: Soft MoE's slots: how much each expert contributes to every token's output."""

from __future__ import annotations

import torch

from moeify import statistics
from moeify.inspect.panels.charts import Heatmap, Lines, Stack
from moeify.inspect.panels.counting import labels, padded, spread
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table
from moeify.inspect.trace import Trace

_PLACES = 64


def slots(trace: Trace) -> Panel:
    """The weight of every expert's slots in the outputs (Soft MoE, arXiv 2308.00951, eq. 3), by layer and place.

    Raises:
        NotMeasured: no layer is a dense mixture whose weights are known.
    """
    layers = [layer for layer in trace if layer.k == 0 and layer.scores is not None]
    if not layers:
        raise NotMeasured("no layer is a Soft MoE whose weights of slots were recorded")
    short = labels(layers)
    weights = {layer.name: layer.scores.float() for layer in layers if layer.scores is not None}
    shares = [w.mean(0) * w.shape[1] / w.sum(1).mean() for w in weights.values()]
    spreads = [
        float((statistics.router_entropy(w) / statistics.log_experts(w.shape[1])).mean()) for w in weights.values()
    ]
    place = layers[0].tokens.position
    pictures = [
        Heatmap(values=padded(shares), rows=[*short.values()], unit="times the mean weight", scale="ratio"),
        Lines(
            x=[*short.values()], series={"entropy over experts": spreads}, x_label="layer",
            y_label="entropy / log E of a token's experts",
        ),
    ]  # fmt: skip
    if place is not None:
        last = weights[layers[-1].name]
        by_place = torch.zeros(int(place.max()) + 1, last.shape[1]).index_add(0, place.long(), last)
        by_place /= place.long().bincount().clamp_min(1).unsqueeze(1)
        kept = spread(len(by_place), _PLACES)
        pictures.append(Heatmap(
            values=by_place[kept].T * last.shape[1], rows=[*map(str, range(last.shape[1]))], row="expert",
            columns=[*map(str, kept)], column=f"place in the sequence or image, layer {short[layers[-1].name]}",
            unit="times the mean weight", scale="ratio",
        ))  # fmt: skip
    rows = [
        (short[name], round(e, 3), int(share.argmax()), round(float(share.max()), 2))
        for name, e, share in zip(weights, spreads, shares, strict=True)
    ]
    return Panel(
        title="Slots of Soft MoE",
        question="How much of the outputs comes from the slots of each expert, and is a token served by one or by all?",
        picture=Stack(pictures),
        table=Table(("layer", "entropy / log E", "largest expert", "its weight"), rows),
        advice=_advice(dict(zip(weights, spreads, strict=True)), shares),
    )


def _advice(spreads: dict[str, float], shares: list[torch.Tensor]) -> Advice:
    mean, peak = sum(spreads.values()) / len(spreads), max(float(share.max()) for share in shares)
    finding = (
        f"A token's weights have {mean:.0%} of the largest entropy; the largest expert has {peak:.1f} times the "
        "mean weight."
    )
    if mean > 0.99:
        return Advice(
            level="look", finding=finding,
            action="Train longer, raise the learned scale of the router, or use more slots per expert with fewer "
            "experts: "
            "so far every expert sees the same average.",
            gain="no number is known; at entropy 1 the layer computes what one expert of the same width does",
            source="equation 2 with equal weights",
        )  # fmt: skip
    return Advice(
        level="fine", finding=finding,
        action="Nothing; a dense mixture cannot be unbalanced, and needs no balance loss.",
        gain="none", source="arXiv 2308.00951, section 2.2",
    )  # fmt: skip
