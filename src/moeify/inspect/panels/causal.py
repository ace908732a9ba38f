"""Panel: how the loss rises when an expert is masked, beside how often it is chosen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.inspect.measurements.masking import Masked
from moeify.inspect.panels.charts import Points
from moeify.inspect.panels.counting import short_names
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table

_RESAMPLES = 1000


def causal(whole: Float[Tensor, "S"], masked: Sequence[Masked], experts: int) -> Panel:
    """Rise of the loss without single experts, with a bootstrap over sequences, paired and seeded.

    Args:
        whole: the loss of every sequence with all experts.
        masked: what was measured.
        experts: how many there are in all.

    Raises:
        NotMeasured: fewer than three experts were masked.
    """
    if len(masked) < 3:
        raise NotMeasured("fewer than three experts were masked")
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
    return Panel(
        title="Causal score",
        question="How much does the loss rise when an expert is masked, and does its load predict the rise?",
        picture=Points(
            names=names, x=loads.tolist(), y=means.tolist(), interval=(low.tolist(), high.tolist()),
            x_label="load, times the fair share", y_label="rise of the loss, nats per token",
        ),
        table=Table(("layer", "expert", "load", "rise of the loss", "2.5 %", "97.5 %"), rows),
        advice=_advice(masked, means, low, loads, float(whole.mean())),
        notes=(
            f"{len(masked)} of {experts} experts, of large, middling and small load, each masked alone; "
            f"{len(whole)} sequences, loss {float(whole.mean()):.4f} nats per token; bootstrap, paired, seed 0.",
        ),
    )  # fmt: skip


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


def _advice(masked: Sequence[Masked], means: Tensor, low: Tensor, loads: Tensor, whole: float) -> Advice:
    rank = rank_correlation(loads, means)
    best = int(means.argmax())
    harmless = int((low <= 0).sum())
    finding = (
        f"Without expert {masked[best].expert} in {masked[best].layer} the loss rises by {float(means[best]):.4f} of "
    )
    finding += (
        f"{whole:.4f}; {harmless} of {len(masked)} masked experts make no clear difference; the load ranks experts "
    )
    finding += f"as their effect does to {rank:.2f} (Spearman)."
    if harmless > len(masked) / 2:
        return Advice(
            level="look", finding=finding,
            action="Prune: start with the experts whose interval holds 0, one layer at a time, and measure after each; "
            "experts that are harmless one by one need not be harmless together.",
            gain=f"up to {harmless / len(masked):.0%} of the experts that were masked, at no measurable loss one by "
            "one",
            source="measured here",
        )  # fmt: skip
    return Advice(
        level="fine", finding=finding,
        action="Prune by effect, not by load: " + ("the two disagree here." if not rank > 0.7 else "here they agree."),
        gain="none in size: most experts that were masked are needed", source="measured here",
    )  # fmt: skip
