"""Constant experts: their output mixes the token with a learned vector (MoE++)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.experts.base import Experts, cut
from moeify.exportable import repeat_for_rows
from moeify.kernels import grouped_linear


class Constant(Experts):
    """Experts with the output α₁·x + α₂·v, with (α₁, α₂) = softmax(W_c x) (MoE++, arXiv 2410.07348).

    They cost almost nothing, as `Identity` and `Zero` do; put them beside `FFN`s in `Blocks`.

    Args:
        num_experts: E.
        width: D.
    """

    def __init__(self, num_experts: int, width: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, 2, width).uniform_(-1, 1) / math.sqrt(width))
        self.vector = nn.Parameter(torch.randn(num_experts, width))

    @property
    def costs(self) -> Float[Tensor, "E"]:
        """A cost of zero."""
        return torch.zeros(self.num_experts)

    def part(self, first: int, last: int) -> Constant:
        """The experts `first` to `last - 1` alone."""
        return cut(self, first, last)

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R D"]:
        """Mix every row with the vector of its expert."""
        logits = grouped_linear(rows, self.weight, counts)
        own, other = logits.float().softmax(-1).unsqueeze(-1).unbind(1)  # each (R, 1)
        vector = repeat_for_rows(self.vector, counts, rows.shape[0])
        return (own * rows + other * vector).to(rows.dtype)
