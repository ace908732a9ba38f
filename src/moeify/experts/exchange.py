"""The exchange of rows between processes: each sends some to every other, and gradients travel back."""

from __future__ import annotations

from typing import Any

import torch
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
