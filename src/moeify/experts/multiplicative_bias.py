"""Experts whose hidden units are multiplied by a learned vector of each expert (ST-MoE)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.experts.base import Experts, cut
from moeify.experts.ffn import FFN


class MultiplicativeBias(Experts):
    """`down(activation(up(x)) ⊙ b)`, with a learned vector b of every expert (ST-MoE, arXiv 2202.08906, page 32).

    It starts at 1. Parameters are those of the experts and `multiplicative_bias (E, H)`.

    Args:
        experts: feed-forward experts.
    """

    def __init__(self, experts: FFN) -> None:
        super().__init__()
        self.experts, self.num_experts = experts, experts.num_experts
        like = experts.down_proj
        self.multiplicative_bias = nn.Parameter(
            torch.ones(experts.num_experts, experts.hidden, device=like.device, dtype=like.dtype)
        )

    def part(self, first: int, last: int) -> MultiplicativeBias:
        """The experts `first` to `last - 1` alone."""
        return cut(self, first, last)

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """Multiply between the halves of the experts."""
        hidden = self.experts.hidden_units(rows, counts)
        bias = self.multiplicative_bias.repeat_interleave(counts, dim=0, output_size=len(rows))
        return self.experts.project_down(hidden * bias, counts)
