"""The exchange of rows between processes: each sends some to every other, and gradients travel back."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable


class Exchange(torch.autograd.Function):
    """An all-to-all of rows with a size for every process; the gradient goes the other way, times a constant.

    It waits for the rows. The functional collectives of torch return before, and a process that ran them on gloo
    sometimes aborts when it exits.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, receive: list[int], send: list[int], group: Any, gradient_scale: float = 1.0
    ) -> Tensor:
        """The rows that this process receives, those of the first process first."""
        ctx.back = send, receive, group, gradient_scale
        return _exchange(rows, receive, send, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        """The gradient of every row, where the row came from."""
        *sizes_and_group, scale = ctx.back
        back = _exchange(gradient, *sizes_and_group)
        return back if scale == 1 else back.mul_(scale), None, None, None, None


def _exchange(rows: Tensor, receive: list[int], send: list[int], group: Any) -> Tensor:
    got = rows.new_empty(sum(receive), *rows.shape[1:])
    distributed.all_to_all_single(got, rows.contiguous(), receive, send, group=group)
    return got


def by_slot(counts: Int[Tensor, "E"], slots: Int[Tensor, "E"]) -> tuple[Int[Tensor, "R"], Int[Tensor, "E"]]:
    """The rows in the order of slots, each with an expert, and the rows of every slot; they were sorted by expert.

    Args:
        counts: rows of every expert.
        slots: the expert in each slot.
    """
    first, per_slot = counts.cumsum(0) - counts, counts[slots]
    shift = (first[slots] - (per_slot.cumsum(0) - per_slot)).repeat_interleave(per_slot)
    return shift + torch.arange(len(shift), device=counts.device), per_slot


def returned(outputs: Float[Tensor, "R O"], order: Int[Tensor, "R"]) -> Float[Tensor, "R O"]:
    """Outputs of rows that were taken in an order, in the order that the rows had before."""
    return torch.empty_like(outputs).index_copy(0, order, outputs)
