"""Tables of the tokens that sparse layers read (ids, sequences, positions), one for each forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeify.context import Context
from moeify.inspect.stacks import MODALITIES, Stack, ids_of, innermost, modalities_of, samples_of, stacks_of
from moeify.inspect.trace import DECODE, PREFILL, Tokens
from moeify.layers import SparseLayer
from moeify.routing import Mixture, Routing


@dataclass(frozen=True)
class LayerTokens:
    """The tokens that a layer read in a forward pass, without padding.

    Attributes:
        tokens: their table.
        positions: their indices among all tokens, padding included.
        sequence: the index of the sequence, document or image that each belongs to, as routers see it.
    """

    tokens: Tokens
    positions: Int[Tensor, "T"]
    sequence: Int[Tensor, "T"]


class TokenTables:
    """Makes the table of a layer's tokens; in one pass, layers that see the same ones get the same table."""

    def __init__(self, model: nn.Module, layers: Mapping[str, SparseLayer]) -> None:
        self.layers = layers
        self.stacks = stacks_of(model)
        self.stack_of = {name: innermost(self.stacks, layer.module) for name, layer in layers.items()}
        self.begin(None)

    def watch(self) -> list[RemovableHandle]:
        """Read what the model and its stacks are called with, and count its passes."""
        handles = [stack.watch() for stack in self.stacks]
        return [*handles, self.stacks[0].module.register_forward_hook(self._end_pass)]

    def begin(self, domain: str | Sequence[str] | None) -> None:
        """Begin a batch, all of one domain or with one domain per row."""
        self.domain = domain
        self.step = 0
        self.tables: dict[Any, LayerTokens] = {}
        self.past: dict[Stack, Int[Tensor, "B"]] = {}
        self.ahead: dict[Stack, Int[Tensor, "B"]] = {}

    def _end_pass(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.step += 1
        self.past |= self.ahead
        self.tables = {}

    def of(self, name: str, routing: Routing) -> LayerTokens:
        """The tokens that a layer read when it made a decision."""
        context, stack = self.layers[name].context, self.stack_of[name]
        shape = tuple(routing.shape)
        if isinstance(routing, Mixture) and routing.source is None:
            shape = tuple(routing.into.shape[:-1])
        real = context.real(shape)
        key = (stack, shape, None if real is None else tuple(real.tolist()))
        if key not in self.tables:
            self.tables[key] = self._make(context, stack, shape, real)
        return self.tables[key]

    def _make(
        self, context: Context, stack: Stack, shape: tuple[int, ...], real: Int[Tensor, "T"] | None
    ) -> LayerTokens:
        model, tokens = self.stacks[0], torch.Size(shape).numel()
        positions = torch.arange(tokens) if real is None else real.cpu()
        counted = context.sequence_ids(shape).cpu()[positions]
        samples = samples_of(stack, model, tokens)
        ids = ids_of(stack, model, shape)
        by_sample = len(shape) == 1 and ids is None and samples > 1 and not counted.any()
        sequence = positions // (tokens // samples) if by_sample else counted
        place = self._places(stack, sequence)
        columns: dict[str, Any] = {
            "sequence": sequence,
            "position": place,
            **self._domains(positions, tokens, context.batch_first),
        }
        if ids is not None:
            columns["ids"] = ids[positions]
        kinds = modalities_of(stack, model, ids)
        if isinstance(kinds, str):
            columns |= {"modality": torch.zeros_like(positions), "modalities": (kinds,)}
        elif kinds is not None:
            columns |= {"modality": kinds[positions], "modalities": MODALITIES}
        constants = {"phase": DECODE if self.step else PREFILL, "step": self.step, "batch": 0}
        columns |= {name: torch.full_like(positions, value) for name, value in constants.items()}
        return LayerTokens(Tokens(len(positions), **columns), positions, counted)

    def _places(self, stack: Stack, sequence: Int[Tensor, "T"]) -> Int[Tensor, "T"]:
        """The position of every token in its sequence, after those of earlier passes."""
        rows = sequence.bincount()
        past = self.past.get(stack, torch.zeros_like(rows))
        past = torch.cat([past, past.new_zeros(max(0, len(rows) - len(past)))])
        self.ahead[stack] = past.index_add(0, torch.arange(len(rows)), rows)
        order = sequence.argsort(stable=True)
        first = (rows.cumsum(0) - rows)[sequence[order]]
        place = torch.empty_like(sequence).index_put((order,), torch.arange(len(order)) - first)
        return place + past[sequence]

    def _domains(self, positions: Int[Tensor, "T"], tokens: int, batch_first: bool | None) -> dict[str, Any]:
        if self.domain is None:
            return {}
        if isinstance(self.domain, str):
            return {"domain": torch.zeros_like(positions), "domains": (self.domain,)}
        rows = len(self.domain)
        if rows == 0 or tokens % rows:
            raise ValueError(
                f"a batch has {rows} domains and a layer {tokens} tokens, which are not of so many rows; give one "
                "domain for the batch, or one for every row"
            )
        names = tuple(dict.fromkeys(self.domain))
        row = positions % rows if batch_first is False else positions // (tokens // rows)
        return {"domain": torch.tensor([names.index(name) for name in self.domain])[row], "domains": names}
