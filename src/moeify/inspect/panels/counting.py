"""Counts that several panels need: rows per expert of every layer, and by group of tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeify import statistics
from moeify.inspect.panels.panel import NotMeasured
from moeify.inspect.trace import LayerTrace, Trace


def choosing(trace: Trace) -> list[LayerTrace]:
    """The layers whose tokens choose experts, fewer than all.

    Raises:
        NotMeasured: every layer is a dense mixture.
    """
    routed = [layer for layer in trace if layer.k and bool((layer.experts >= 0).any())]
    if not routed:
        raise NotMeasured("no layer sends tokens to experts of their own: Soft MoE gives every expert an even load")
    if layers := [layer for layer in routed if not has_all(layer)]:
        return layers
    raise NotMeasured("every token has all experts, so none is chosen and every load is even; their weights differ")


def has_all(layer: LayerTrace) -> bool:
    """Whether every token is sent to every expert."""
    return layer.k >= layer.num_experts and bool((layer.assigned == len(layer.tokens)).all())


def rows_by_group(layer: LayerTrace, group: Int[Tensor, "T"], groups: int) -> Int[Tensor, "G E"]:
    """Assigned rows of every expert by group of tokens; tokens of group -1 are omitted."""
    there = (layer.experts >= 0) & (group >= 0).unsqueeze(1)
    pairs = group.long().unsqueeze(1) * layer.num_experts + layer.experts.long()
    return pairs[there].bincount(minlength=groups * layer.num_experts).view(groups, layer.num_experts)


def padded(rows: Sequence[Tensor]) -> Float[Tensor, "L E"]:
    """Values of layers with different numbers of experts as one matrix, NaN where a layer has no such expert."""
    wide = torch.full((len(rows), max(len(row) for row in rows)), float("nan"))
    for filled, row in zip(wide, rows, strict=True):
        filled[: len(row)] = row
    return wide


def shares(rows: Tensor) -> Tensor:
    """Load over the fair share: 1 is even, NaN without rows."""
    fair = statistics.load(rows.float()) * rows.shape[-1]
    return fair.masked_fill(rows.sum(-1, keepdim=True) == 0, float("nan"))


def short_names(names: Sequence[str]) -> list[str]:
    """Names of layers without the parts that all have in common: `model.layers.3.mlp` is `3`."""
    if len(names) < 2:
        numbers = re.findall(r"\d+", names[0]) if names else []
        return numbers[-1:] if numbers else list(names)
    parts = [name.split(".") for name in names]
    if len({len(part) for part in parts}) == 1:
        differ = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
        return [".".join(part[i] for i in differ) for part in parts]
    start = _common(parts)
    end = _common([part[start:][::-1] for part in parts])
    short = [".".join(part[start : len(part) - end]) for part in parts]
    return short if all(short) and len(set(short)) == len(short) else list(names)


def _common(parts: Sequence[Sequence[str]]) -> int:
    """How many parts at the beginning all have in common."""
    count = 0
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            return count
        count += 1
    return count


def spread(count: int, most: int) -> list[int]:
    """At most `most` places among `count`, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)})


def short(names: Sequence[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


ENOUGH = 20
"""Rows per expert below which a load is unreliable: by chance alone it has a standard deviation of 22 %."""


def rows_per_expert(layers: Sequence[LayerTrace]) -> float:
    """Rows that an expert would have if all had the same, in the layer that has the fewest."""
    return min(int(layer.assigned.sum()) / layer.num_experts for layer in layers)


def labels(layers: Sequence[LayerTrace]) -> dict[str, str]:
    """The short name of every layer by its name."""
    names = [layer.name for layer in layers]
    return dict(zip(names, short_names(names), strict=True))


def quantiles(values: Tensor, *at: float) -> list[float]:
    """Quantiles of some values, of evenly spread ones where there are more than torch sorts at once."""
    flat = values.flatten().float()
    return torch.quantile(flat[:: max(1, len(flat) // 1_000_000)], torch.tensor(at)).tolist()
