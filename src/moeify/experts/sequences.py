"""Whole modules as experts, such as attention or layers, which need all tokens of a sequence and further arguments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.experts.base import Experts
from moeify.routing import Routing


class Sequences(Experts):
    """Modules that are each called on the sequences routed to them, with their part of all further arguments.

    A decision per token is refused: attention of one expert to tokens of another is not defined.

    Args:
        modules: one module per expert, which take tokens (B, N, D) and more.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(modules)
        self.num_experts = len(self.experts)

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """Refuse rows, which are not sequences.

        Raises:
            ValueError: always; `mixed` is what runs them.
        """
        raise ValueError("whole modules run on sequences, not on rows; only a MoE layer of their model calls them")

    def part(self, first: int, last: int) -> Sequences:
        """Refuse to be divided.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "whole modules as experts read sequences with all further arguments, which do not travel between "
            "processes; keep them whole in every process (ep=1), under DDP or FSDP"
        )

    def mixed(self, x: Float[Tensor, "B N D"], routing: Routing, others: tuple, named: dict[str, Any]) -> Any:
        """Call every expert on its sequences, and add up its outputs, a tensor or a structure of them, by its weights.

        Raises:
            ValueError: a decision per token, a cache of keys and values, or an argument that cannot be divided.
        """
        weights = _by_sequence(x, routing)  # (B, E)
        for value in _leaves((others, named)):
            if hasattr(value, "get_seq_length"):
                raise ValueError(
                    "modules as experts keep no cache of keys and values, for a sequence's tokens would have to be in "
                    "those of all its experts; set model.config.use_cache = False, or generate(use_cache=False)"
                )
        total: Any = None
        for expert, weight in zip(self.experts, weights.unbind(1), strict=True):
            sequences = weight.nonzero().flatten()
            if len(sequences):
                part = _select((x, others, named), sequences, x.shape[:2])
                output = expert(part[0], *part[1], **part[2])
                total = _add(total, output, weight[sequences], sequences, len(x))
        return torch.zeros_like(x) if total is None else total


def _by_sequence(x: Tensor, routing: Routing) -> Float[Tensor, "B E"]:
    if x.dim() != 3:
        raise ValueError(f"modules as experts need sequences (B, N, D), and were given {tuple(x.shape)}")
    table = routing.weight_table().view(*x.shape[:2], -1)
    real = routing.reads().any(-1).view(x.shape[:2])
    of_first = table[torch.arange(len(x), device=x.device), real.int().argmax(1)]
    if not torch.equal(table, of_first.unsqueeze(1) * real.unsqueeze(-1)):
        raise ValueError(
            "the tokens of one sequence have different experts or weights, and modules as experts need all tokens of "
            "theirs; decide once per sequence, as TopK(per='sequence') or Lookup of a column does"
        )
    return of_first


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


def _select(value: Any, sequences: Int[Tensor, "b"], shape: torch.Size) -> Any:
    """The part of an argument that belongs to some of the sequences, which lie along its first dimension."""
    if isinstance(value, dict):
        return {key: _select(part, sequences, shape) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_select(part, sequences, shape) for part in value)
    batch, length = shape
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value) != batch or batch == 1:
        return value
    if value.dim() == 1 or (value.shape == (length, length) and not _is_whole(value)):
        raise ValueError(
            f"an argument of shape {tuple(value.shape)} beside {batch} sequences of {length} tokens may belong to "
            "sequences or to tokens; call the model with another number of sequences"
        )
    return value.index_select(0, sequences)


def _is_whole(value: Tensor) -> bool:
    return not value.is_floating_point() and value.dtype is not torch.bool


def _add(total: Any, output: Any, weight: Float[Tensor, "b"], sequences: Int[Tensor, "b"], batch: int) -> Any:
    """Add an expert's outputs, times their weights, to those of the experts before it."""
    if isinstance(output, tuple | list):
        totals = (None,) * len(output) if total is None else total
        return type(output)(_add(t, o, weight, sequences, batch) for t, o in zip(totals, output, strict=True))
    if not isinstance(output, Tensor) or len(output) != len(sequences):
        return None
    if total is None:
        total = output.new_zeros(batch, *output.shape[1:])
    return total.index_add(0, sequences, output * weight.to(output.dtype).view(-1, *[1] * (output.dim() - 1)))
