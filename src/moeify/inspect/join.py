"""Join traces of several batches or files into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moeify.inspect.trace import COLUMNS, LAYER_COLUMNS, LayerTrace, Tokens, Trace


def concatenate(traces: Sequence[Trace], *, renumber: bool = True) -> Trace:
    """One trace of the tokens of several, one after the other; the header is that of the first.

    A column of tokens that only some of them have is -1 where it is not known. Layers keep sharing their tokens.

    Args:
        traces: of the same model: a layer has the same number of experts wherever it occurs.
        renumber: count sequences and batches on from one trace to the next; else numbers are kept as they are.

    Raises:
        ValueError: no trace; layers with different numbers of experts; scores, logits or weights in some traces only.
    """
    if not traces:
        raise ValueError("there is no trace to concatenate")
    shifts = _shifts(traces) if renumber else [{} for _ in traces]
    parts: dict[str, list[Part]] = {}
    for trace, shift in zip(traces, shifts, strict=True):
        for layer in trace:
            parts.setdefault(layer.name, []).append((layer, shift))
    return Trace(layers=join(parts), header=traces[0].header)


Part = tuple[LayerTrace, dict[str, int]]
"""What a layer decided for some of the tokens, and what is to be added to columns of their table."""


def join(parts: Mapping[str, Sequence[Part]]) -> dict[str, LayerTrace]:
    """Each layer's trace from its parts; layers that share all tables share the joined one."""
    tables: dict[tuple[int, ...], Tokens] = {}
    layers = {}
    for name, of_layer in parts.items():
        key = tuple(id(layer.tokens) for layer, _ in of_layer)
        if key not in tables:
            tables[key] = join_tokens([layer.tokens for layer, _ in of_layer], [shift for _, shift in of_layer])
        layers[name] = join_layers([layer for layer, _ in of_layer], tables[key])
    return layers


def _shifts(traces: Sequence[Trace]) -> list[dict[str, int]]:
    """What is added to sequences and batches of each trace, so that none has a number of an earlier one."""
    shifts, begun = [], {"sequence": 0, "batch": 0}
    for trace in traces:
        shifts.append(dict(begun))
        for name in begun:
            columns = [table.columns[name] for table in trace.tables if name in table.columns and len(table)]
            begun[name] += max((int(column.max()) for column in columns), default=-1) + 1
    return shifts


def join_tokens(tables: Sequence[Tokens], shifts: Sequence[dict[str, int]] | None = None) -> Tokens:
    """One table of the tokens of several, with the names of all of them.

    Args:
        tables: in order.
        shifts: what is added to some columns of each table.
    """
    shifts = [{} for _ in tables] if shifts is None else shifts
    names: dict[str, Any] = {}
    renamed: dict[str, list[Tensor]] = {}
    for column, kind in (("domain", "domains"), ("modality", "modalities")):
        names[kind] = tuple(dict.fromkeys(name for table in tables for name in getattr(table, kind)))
        renamed[column] = [_to_new(getattr(table, kind), names[kind]) for table in tables]
    columns: dict[str, Any] = {}
    for name, kind in COLUMNS.items():
        if all(getattr(table, name) is None for table in tables):
            continue
        parts = []
        for number, (table, shift) in enumerate(zip(tables, shifts, strict=True)):
            values = getattr(table, name)
            values = torch.full((len(table),), -1, dtype=kind) if values is None else values
            if name in renamed:
                values = renamed[name][number][values.long()].to(kind)
            parts.append(torch.where(values >= 0, values + shift.get(name, 0), values))
        columns[name] = torch.cat(parts)
    vocabulary = {number: text for table in tables for number, text in table.vocabulary.items()}
    return Tokens(sum(map(len, tables)), **columns, **names, vocabulary=vocabulary)


def _to_new(old: Sequence[str], new: Sequence[str]) -> Tensor:
    """The new number of every old one; the last place, which -1 looks at, stays -1."""
    return torch.tensor([*(new.index(name) for name in old), -1])


def join_layers(parts: Sequence[LayerTrace], tokens: Tokens) -> LayerTrace:
    """One layer's trace from several, for a table that was joined already.

    Raises:
        ValueError: different numbers of experts; scores, logits or weights in some parts only.
    """
    first = parts[0]
    if len(sizes := sorted({part.num_experts for part in parts})) > 1:
        raise ValueError(f"layer {first.name} has {' and '.join(map(str, sizes))} experts; these are two models")
    if any(part.dropped is not None for part in parts):
        parts = [part if part.dropped is not None else _with_nothing_dropped(part) for part in parts]
    columns: dict[str, Any] = {}
    k = max(part.k for part in parts)
    for name in LAYER_COLUMNS:
        values = [part.columns[name] for part in parts if name in part.columns]
        if values and len(values) < len(parts):
            raise ValueError(
                f"layer {first.name} has {name} in {len(values)} of {len(parts)} traces; leave them out by "
                f"trace.without({name!r})"
            )
        if name in _EMPTY:
            values = [_padded(v, k, _EMPTY[name]) for v in values]
        if values:
            columns[name] = torch.cat(values)
    extra = {name: torch.cat([_padded(part.extra[name], k, 0) for part in parts]) for name in _shared_extra(parts)}
    return LayerTrace(name=first.name, num_experts=first.num_experts, tokens=tokens, extra=extra, **columns)


def _padded(values: Tensor, k: int, value: float) -> Tensor:
    return F.pad(values, (0, k - values.shape[1]), value=value)


def _shared_extra(parts: Sequence[LayerTrace]) -> list[str]:
    return [name for name in parts[0].extra if all(name in part.extra for part in parts)]


_EMPTY = {"experts": -1, "weights": 0.0, "dropped": False}
"""The fill value where a token has fewer than K experts."""


def _with_nothing_dropped(layer: LayerTrace) -> LayerTrace:
    return replace(layer, dropped=torch.zeros(layer.experts.shape, dtype=torch.bool))
