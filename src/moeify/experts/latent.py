"""Experts in a latent space: tokens are projected down before the experts and up after them (LatentMoE)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.experts.base import Experts, cut


class Latent(Experts):
    """E(x) = W_up · expert(W_down · x): experts of width L between two projections that all share (LatentMoE).

    The projections have no bias, so they may be moved out of the sum over experts, y = W_up Σ_j g_j · expert_j(W_down
    x): backend `latent` computes them once per token, and the experts inside by any backend. An expert costs L / D as
    much, and has and reads L / D as many numbers; the router reads whole tokens.

    Args:
        experts: the experts, from rows of width L to rows of width L.
        width: D.
        latent: L.
        width_out: O, D if not given.
    """

    def __init__(self, experts: Experts, width: int, latent: int, *, width_out: int | None = None) -> None:
        super().__init__()
        self.experts, self.num_experts = experts, experts.num_experts
        self.down = nn.Linear(width, latent, bias=False)
        self.up = nn.Linear(latent, width if width_out is None else width_out, bias=False)
        for projection in (self.down, self.up):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)  # outputs as large as inputs

    @property
    def costs(self) -> Float[Tensor, "E"]:
        """The cost of a row at each wrapped expert, relative to the most expensive."""
        return self.experts.costs

    def part(self, first: int, last: int) -> Latent:
        """The experts `first` to `last - 1` alone."""
        return cut(self, first, last)

    def common_modules(self) -> tuple[nn.Module, ...]:
        """The two projections."""
        return self.down, self.up

    def per_token_modules(self) -> tuple[nn.Module, ...]:
        """The two projections."""
        return self.down, self.up

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """Project every row down, run its expert, and project the output up."""
        return self.up(self.experts(self.down(rows), counts))

    def all_outputs(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E O"]:
        """The output of every expert for every token."""
        return self.up(self.experts.all_outputs(self.down(x)))
