"""Panel: how similar the experts of a layer are, in weights and in outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.inspect.measurements.pairwise import PairwiseSimilarity
from moeify.inspect.panels.charts import Bars, Choice, Heatmap, Stack
from moeify.inspect.panels.counting import short_names, spread
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table

_LAYERS = 8
_SAYS = {"cosine of outputs": "outputs", "linear CKA of outputs": "cka", "cosine of weights": "weights"}


def similarity(found: Mapping[str, PairwiseSimilarity]) -> Panel:
    """Mean similarity over the pairs of experts of every layer, and each pair in some layers.

    Args:
        found: what was measured, by layer.

    Raises:
        NotMeasured: no layer's experts can be compared.
    """
    found = {name: like for name, like in found.items() if like.weights is not None or like.outputs is not None}
    if not found:
        raise NotMeasured("the experts of this model can neither be called one by one nor are their weights stacked")
    names = list(found)
    short = dict(zip(names, short_names(names), strict=True))
    means = {kind: [_mean(getattr(like, part)) for like in found.values()] for kind, part in _SAYS.items()}
    shown = [names[i] for i in spread(len(names), _LAYERS)]
    charts = {
        f"{short[name]}, {kind}": Heatmap(
            values=matrix, rows=[*map(str, range(len(matrix)))], row="expert", column="with expert", scale="signed"
        )
        for name in shown
        for kind, part in _SAYS.items()
        if (matrix := getattr(found[name], part)) is not None
    }
    rows = [(short[name], *(_round(values[i]) for values in means.values())) for i, name in enumerate(names)]
    bars = Bars(names=[short[name] for name in names], series=means, x_label="layer", y_label="mean over pairs")
    notes = (f"Matrices of {len(shown)} of {len(names)} layers, evenly spread.",) if len(shown) < len(names) else ()
    return Panel(
        title="Similarity of experts",
        question="Do experts compute different things? 1 is the same, 0 unrelated.",
        picture=Stack([bars, Choice(label="layer", charts=charts)]),
        table=Table(("layer", *means), rows), advice=_advice(found), notes=notes,
    )  # fmt: skip


def _mean(matrix: Float[Tensor, "E E"] | None) -> float:
    """Over pairs of different experts."""
    if matrix is None or len(matrix) < 2:
        return math.nan
    return float(matrix[~torch.eye(len(matrix), dtype=torch.bool)].nanmean())


def _round(value: float) -> float | str:
    return "unknown" if math.isnan(value) else round(value, 3)


def _advice(found: Mapping[str, PairwiseSimilarity]) -> Advice:
    means = {name: _mean(like.outputs if like.outputs is not None else like.weights) for name, like in found.items()}
    highest = max(means, key=means.__getitem__)
    finding = f"The mean similarity of two experts is {means[highest]:.2f} in {highest}, "
    finding += f"{sum(means.values()) / len(means):.2f} in the mean over layers."
    pair, where, most = _alike(found)
    if most > -1:
        finding += f" The most similar are {pair} in {where}, {most:.2f}."
    if means[highest] > 0.999:
        return Advice(
            level="act", finding=finding,
            action="The experts are copies: upcycle with noise or by drop-upcycling (experts='drop_copies'), or train "
            "longer. Until then one dense network computes the same.",
            gain="at most the expert parameters of all but one copy; the same function in 1/E of the memory",
            source="identical outputs here",
        )  # fmt: skip
    if means[highest] > 0.8:
        return Advice(
            level="look", finding=finding,
            action="Merge similar experts rather than prune them (REAM groups by outputs), or add a loss that makes "
            "experts differ (moeify.losses.coupling).",
            gain="REAM beats pruning by REAP in many of its authors' cells; no number holds for every model",
            source="arXiv 2604.04356",
        )  # fmt: skip
    if most > 0.95:
        return Advice(
            level="look", finding=finding,
            action="Merge or drop one of a pair that is this similar, one pair at a time, and measure the loss after "
            "each; the others differ.",
            gain="the parameters of one expert per pair", source="measured here, on these data",
        )  # fmt: skip
    return Advice(
        level="fine", finding=finding, action="Do not merge experts; they differ.", gain="none", source="measured here"
    )


def _alike(found: Mapping[str, PairwiseSimilarity]) -> tuple[str, str, float]:
    """The two most similar experts of a layer, by outputs or weights: their numbers, layer and cosine."""
    best = ("", "", -1.0)
    for name, like in found.items():
        matrix = like.outputs if like.outputs is not None else like.weights
        if matrix is not None and len(matrix) > 1:
            others = matrix.nan_to_num(-1.0).masked_fill(torch.eye(len(matrix), dtype=torch.bool), -1.0)
            a, b = divmod(int(others.argmax()), len(matrix))
            best = max(best, (f"{a} and {b}", name, float(others[a, b])), key=lambda each: each[2])
    return best
