"""Panel: the share of a decoding step's experts that the previous step used too, by step and layer."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moeify.inspect.panels.charts import Heatmap
from moeify.inspect.panels.counting import choosing, labels, short_names
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table
from moeify.inspect.trace import DECODE, LayerTrace, Trace

_BINS = 96


def reuse(trace: Trace) -> Panel:
    """Share of a decoding step's experts that the step before had loaded, by step and layer.

    Raises:
        NotMeasured: nothing was decoded, or steps are not known.
    """
    layers = [layer for layer in choosing(trace) if layer.tokens.step is not None and layer.tokens.phase is not None]
    decoded = {layer.name: _reused(layer) for layer in layers}
    decoded = {name: steps for name, steps in decoded.items() if len(steps) > 1}
    if not decoded:
        raise NotMeasured("nothing was decoded step by step; trace a generation to see which experts stay in use")
    steps = max(map(len, decoded.values()))
    size = -(-steps // _BINS)
    binned = torch.stack([_binned(values, size, steps) for values in decoded.values()])
    short = labels(layers)
    by_chance = {layer.name: layer.k / layer.num_experts for layer in layers}
    means = {name: float(values.nanmean()) for name, values in decoded.items()}
    rows = [(short[name], f"{mean:.1%}", f"{by_chance[name]:.1%}") for name, mean in means.items()]
    notes = (f"{steps} steps in bins of {size}, each the mean.",) if size > 1 else ()
    return Panel(
        title="Experts in use again",
        question="Which share of a decoding step's experts were in use in the step before?",
        picture=Heatmap(
            values=binned, rows=short_names(list(decoded)), columns=[str(i * size + 1) for i in range(binned.shape[1])],
            column="step", unit="of the experts again",
        ),
        table=Table(("layer", "in use again", "by chance"), rows),
        advice=_advice(means, by_chance, layers), notes=notes,
    )  # fmt: skip


def _reused(layer: LayerTrace) -> Float[Tensor, "steps"]:
    """Of every decoding step but the first of its sequence; steps of several sequences at once are averaged."""
    table = layer.tokens
    chosen = (table.need("phase") == DECODE).nonzero().flatten()
    sequence = table.sequence[chosen] if table.sequence is not None else torch.zeros(len(chosen))
    order = chosen[sequence.argsort(stable=True)]
    used = _used(layer, order)
    again = (used[1:] & used[:-1]).sum(1) / used[1:].sum(1).clamp_min(1)
    sequence = table.sequence[order] if table.sequence is not None else sequence
    same = (sequence[1:] == sequence[:-1]) & used[1:].any(1)
    step = table.need("step")[order][1:][same].long()
    if not len(step):
        return again[:0]
    place = step.unique(return_inverse=True)[1]
    sums = torch.zeros(int(place.max()) + 1).index_add(0, place, again[same])
    return sums / place.bincount()


def _used(layer: LayerTrace, tokens: Tensor) -> Bool[Tensor, "tokens E"]:
    experts = layer.experts[tokens].long()
    found = torch.zeros(len(tokens), layer.num_experts + 1, dtype=torch.bool)
    return found.scatter(1, experts.where(experts >= 0, layer.num_experts), True)[:, :-1]


def _binned(values: Float[Tensor, "steps"], size: int, steps: int) -> Float[Tensor, "bins"]:
    filled = torch.full((-(-steps // size) * size,), float("nan"))
    filled[: len(values)] = values
    return filled.view(-1, size).nanmean(1)


def _advice(means: dict[str, float], by_chance: dict[str, float], layers: list[LayerTrace]) -> Advice:
    mean, chance = sum(means.values()) / len(means), sum(by_chance.values()) / len(by_chance)
    k = sum(layer.k for layer in layers) / len(layers)
    finding = f"{mean:.0%} of the experts of a step were in use in the step before; by chance it would be {chance:.0%}."
    if mean < 1.5 * chance:
        return Advice(
            level="fine", finding=finding, action="Do not keep experts by recency: pin the most used ones "
            "instead.", gain="none",
            source="counted here",
        )  # fmt: skip
    return Advice(
        level="look", finding=finding,
        action=f"Offload with a cache of about {2 * k:.0f} experts per layer that evicts the least recently "
        "used (LRU).",
        gain=f"at least {mean:.0%} of the experts need no reading, with {k:.0f} of them kept per layer",
        source="counted here: a cache of one step's experts",
    )  # fmt: skip
