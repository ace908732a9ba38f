"""`Format`, a file format of traces, and helpers for formats of other programs, which number layers and list rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moeify.inspect.trace import LayerTrace, Tokens, Trace


@dataclass(frozen=True, kw_only=True)
class Format:
    """A file format of traces.

    Attributes:
        name: its name on the command line.
        line: a description in one line.
        endings: the extensions of its files, the usual one first.
        keeps: the columns of tokens and layers that its files hold; None for all.
        recognises: whether a file is of this format, by its path and its first bytes.
        read: the trace of a file; takes `num_experts` and `k` for files that do not store them.
        write: write a trace into a file.
    """

    name: str
    line: str
    endings: tuple[str, ...]
    keeps: frozenset[str] | None
    recognises: Callable[[Path, bytes], bool]
    read: Callable[..., Trace]
    write: Callable[[Trace, Path], None]

    def lost(self, trace: Trace) -> list[str]:
        """The columns of a trace that this format cannot store."""
        if self.keeps is None:
            return []
        columns = {name for table in trace.tables for name in table.columns}
        columns |= {name for layer in trace for name in (*layer.columns, *layer.extra)}
        return sorted(columns - self.keeps)


def layer_number(name: str) -> int:
    """The number in a layer's name.

    Raises:
        ValueError: it has none.
    """
    if (found := re.search(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", name)) is None:
        raise ValueError(f"layer {name} has no number, which this format needs; write moeify's own format")
    return int(found[0])


def by_number(trace: Trace) -> dict[int, LayerTrace]:
    """The layers by number, in this order.

    Raises:
        ValueError: two layers have the same one.
    """
    found: dict[int, LayerTrace] = {}
    for layer in trace:
        number = layer_number(layer.name)
        if number in found:
            raise ValueError(
                f"{found[number].name} and {layer.name} both are layer {number}, and this format has no other name for "
                "layers; choose some by trace.only, or write moeify's own format"
            )
        found[number] = layer
    return dict(sorted(found.items()))


def whole(text: str, where: str, what: str) -> int:
    """Parse an integer of at least 0 from a file.

    Raises:
        ValueError: something else; `where` and `what` name it.
    """
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError(f"{where}: {what} is {text[:40]!r}, and not a whole number from 0 on")
    return int(text)


MOST_EXPERTS = 2**20
"""The most experts of a layer that a file may imply; a larger number counts as damage unless `num_experts` is given."""


def checked_experts(largest: int, num_experts: int | None, where: str) -> int:
    """E: the number that the caller gave, or one more than the largest expert index that occurs.

    Raises:
        ValueError: an index is not below the given number, or is implausibly large.
    """
    if num_experts is None and largest >= MOST_EXPERTS:
        raise ValueError(f"{where} has expert {largest}; the file is damaged, or say how many experts a layer has")
    if num_experts is not None and largest >= num_experts:
        raise ValueError(f"{where} has expert {largest}, which a layer of {num_experts} experts has not")
    return largest + 1 if num_experts is None else num_experts


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a file, each of which is one expert of one token in one layer.

    Attributes:
        token: the token of each row, as an index into the table.
        layer: its layer's number.
        slot: which of the token's experts it is, from 0.
        expert: this expert.
        line: its line in the file.
        values: its other columns in the file, by name.
    """

    token: Int[Tensor, "R"]
    layer: Int[Tensor, "R"]
    slot: Int[Tensor, "R"]
    expert: Int[Tensor, "R"]
    line: Int[Tensor, "R"]
    values: Mapping[str, Tensor]

    def layers(self, tokens: Tokens, num_experts: int | None, where: str) -> dict[str, LayerTrace]:
        """The layers, called `layers.0` and so on; one that saw only some of the tokens has its own table.

        Raises:
            ValueError: two rows for the same slot of a token or none, or an expert index out of range.
        """
        self._check_slots(where)
        experts = checked_experts(int(self.expert.max()), num_experts, where)
        shared: dict[bytes, Tokens] = {}
        found = {}
        for number in self.layer.unique().tolist():
            mine = self.layer == number
            at = self.token[mine], self.slot[mine]
            shape = (len(tokens), int(at[1].max()) + 1)
            seen = torch.zeros(len(tokens), dtype=torch.bool).index_put((at[0],), torch.tensor(True))
            key = seen.numpy().tobytes()
            if key not in shared:
                shared[key] = tokens if bool(seen.all()) else tokens.take(seen)
            columns: dict[str, Any] = {
                name: torch.zeros(shape, dtype=values.dtype).index_put(at, values[mine])[seen]
                for name, values in self.values.items()
            }
            weights = columns.pop("weights", None)
            table = torch.full(shape, -1).index_put(at, self.expert[mine])[seen]
            name = f"layers.{number}"
            found[name] = LayerTrace(
                name=name, num_experts=experts, tokens=shared[key], experts=table, weights=weights, extra=columns
            )
        return found

    def _check_slots(self, where: str) -> None:
        """Refuse a token whose slots in a layer are not 0, 1, ..., each once."""
        layer = self.layer.unique(return_inverse=True)[1]
        owner = layer * (int(self.token.max()) + 1) + self.token
        _, inverse, rows = owner.unique(return_inverse=True, return_counts=True)
        if (far := self.slot >= rows[inverse]).any():
            line, slot = int(self.line[far][0]), int(self.slot[far][0])
            raise ValueError(f"{where}, line {line}: expert number {slot + 1} of a token that has fewer")
        key = inverse * int(rows.max()) + self.slot
        _, inverse, counts = key.unique(return_inverse=True, return_counts=True)
        if (counts > 1).any():
            twice = self.line[counts[inverse] > 1]
            raise ValueError(f"{where}, line {int(twice[1])}: says again what line {int(twice[0])} says")


def passes(tokens: Tokens) -> dict[tuple[int, int], list[int]]:
    """The indices of tokens that a server computes at once, by sequence and step: a prompt, or one decoded token."""
    none = torch.zeros(len(tokens), dtype=torch.int32)
    columns = [none if column is None else column for column in (tokens.sequence, tokens.step)]
    found: dict[tuple[int, int], list[int]] = {}
    for row, (sequence, step) in enumerate(torch.stack(columns, dim=1).tolist()):
        found.setdefault((sequence, step), []).append(row)
    return dict(sorted(found.items()))
