"""Panel: what the model loses when an expert is masked, beside how often it is chosen."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.inspect.measurements.effect import Measure
from moeify.inspect.measurements.masking import Effects
from moeify.inspect.panels.charts import Points
from moeify.inspect.panels.counting import short_names
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table

_RESAMPLES = 1000
_RISE, _CHANGE = 0.005, 0.01
"""Below half a percent of the loss, or one of the outputs' norm, an expert is called harmless."""
_AGREE = {True: "; here they agree.", False: ": the two disagree here."}
_GUESS, _UNITS = 0.98, 4


def causal(effects: Effects, experts: int) -> Panel:
    """What the model loses without single experts, with a bootstrap over sequences, samples or batches.

    Args:
        effects: what was measured.
        experts: how many there are in all.

    Raises:
        NotMeasured: fewer than three experts were masked.
    """
    masked, measure, whole = effects.masked, effects.measure, effects.whole
    if len(masked) < 3:
        raise NotMeasured("fewer than three experts compute something that could be masked")
    layers = list(dict.fromkeys(found.layer for found in masked))
    short = dict(zip(layers, short_names(layers), strict=True))
    rises = torch.stack([found.rise for found in masked])
    low, high = _interval(rises)
    means = rises.mean(1)
    names = [f"layer {short[found.layer]}, expert {found.expert}" for found in masked]
    order = means.argsort(descending=True).tolist()
    rows = [
        (short[m.layer], m.expert, round(m.load, 2), *(round(float(v[i]), 5) for v in (means, low, high)))
        for i, m in ((i, masked[i]) for i in order)
    ]
    loads = torch.tensor([found.load for found in masked])
    rise = measure.name if _is_change(measure) else f"rise of the {measure.name}"
    level = "" if _is_change(measure) else f", {measure.name} {float(whole.mean()):.4f} {measure.unit}"
    return Panel(
        title="Causal score",
        question=f"What does the model lose when an expert is masked ({rise}), and does its load predict it?",
        picture=Points(
            names=names, x=loads.tolist(), y=means.tolist(), interval=(low.tolist(), high.tolist()),
            x_label="load, times the fair share", y_label=f"{rise}, {measure.unit}",
        ),
        table=Table(("layer", "expert", "load", rise, "2.5%", "97.5%"), rows),
        advice=_advice(effects, means, (low, high), loads),
        notes=(
            f"{len(masked)} of {experts} experts, of large, middling and small load, each masked alone; {len(whole)} "
            f"{measure.each}{level}; bootstrap, paired, seed 0.",
        ),
    )  # fmt: skip


def _is_change(measure: Measure) -> bool:
    return measure.name != "loss"


def _interval(rises: Float[Tensor, "N S"]) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """95 % of the means over resampled sequences, the same ones for all experts."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(rises.shape[1], (_RESAMPLES, rises.shape[1]), generator=generator)
    means = rises[:, drawn].mean(-1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975]), dim=1)
    return low, high


def rank_correlation(one: Float[Tensor, "N"], other: Float[Tensor, "N"]) -> float:
    """Spearman's: the correlation of the ranks; NaN where all values are equal."""
    ranks = torch.stack([_ranks(one), _ranks(other)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """Ranks, equal values sharing their mean rank."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts + 1) / 2)[place]


def _advice(effects: Effects, means: Tensor, interval: tuple[Tensor, Tensor], loads: Tensor) -> Advice:
    masked, measure, whole = effects.masked, effects.measure, float(effects.whole.mean())
    limit = _CHANGE if _is_change(measure) else _RISE * whole
    low, high = interval
    harmless, needed = int((high <= limit).sum()), int(((low > 0) & (high > limit)).sum())
    rank, best, count = rank_correlation(loads, means), int(means.argmax()), len(masked)
    effect = (
        f"the outputs change by {float(means[best]):.1%} of their norm"
        if _is_change(measure) else f"the loss rises by {float(means[best]):.4f} of {whole:.4f}"
    )  # fmt: skip
    finding = (
        f"Without expert {masked[best].expert} in {masked[best].layer} {effect}. Of {count} masked experts {harmless} "
        f"cost less than {limit:.2g}, {needed} cost more, {count - harmless - needed} are unclear; "
    ) + ("all loads are equal." if math.isnan(rank) else f"loads and effects have a rank correlation of {rank:.2f}.")
    if measure.chance is not None and whole > _GUESS * measure.chance:
        return Advice(
            level="unknown", finding=f"{finding} But the model guesses: chance is {measure.chance:.4f}.",
            action="Train the model, or give it the data that it was trained on, before you ask what its experts do.",
            gain="none: what masking does to guesses says nothing about experts", source="log of the number of classes",
        )  # fmt: skip
    if count - harmless - needed > count / 2 or len(effects.whole) < _UNITS:
        return Advice(
            level="unknown", finding=finding,
            action=f"Mask on more data: intervals over {len(effects.whole)} {measure.each} are too wide, or too few to "
            "have any, to call an expert harmless or needed.",
            gain="four times the data halves the intervals", source="1/√n, the error of a mean",
        )  # fmt: skip
    if harmless == count:
        return Advice(
            level="look", finding=finding,
            action="Measure how much whole layers do before you prune: moeify.inspect.redundancy takes the first "
            "expert from every token. Masked one by one, experts make up for each other, or do little so far.",
            gain="none that masking one expert at a time can show", source="measured here, one by one",
        )  # fmt: skip
    if harmless > count / 2:
        return Advice(
            level="look", finding=finding,
            action="Prune: start with the experts whose interval is lowest, one layer at a time, and measure after "
            "each; experts that are harmless one by one need not be harmless together.",
            gain=f"up to {harmless / count:.0%} of the experts that were masked, each at less than {limit:.2g}",
            source="measured here, one by one",
        )  # fmt: skip
    return Advice(
        level="fine", finding=finding,
        action="Prune by effect, not by load" + ("." if math.isnan(rank) else _AGREE[rank > 0.7]),
        gain="none in size: most experts that were masked are needed", source="measured here",
    )  # fmt: skip
