"""Experts whose input rows are multiplied by a constant (MoE++)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from moeify.experts.base import Experts, cut


class Scaled(Experts):
    """Multiplies the rows by a constant before the experts read them.

    The code of MoE++ (SkyworkAI/MoE-plus-plus) doubles the input of all experts, of which a token uses two: a copy
    expert outputs twice the token, and an FFN reads twice the token.

    Args:
        experts: the experts.
        scale: multiplies the rows.
    """

    def __init__(self, experts: Experts, scale: float) -> None:
        super().__init__()
        self.experts, self.scale = experts, scale
        self.num_experts = experts.num_experts

    @property
    def costs(self) -> Float[Tensor, "E"]:
        """The cost of a row at each scaled expert, relative to the most expensive."""
        return self.experts.costs

    def part(self, first: int, last: int) -> Scaled:
        """The experts `first` to `last - 1` alone."""
        return cut(self, first, last)

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """Run the experts on the scaled rows."""
        return self.experts(rows * self.scale, counts)

    def extra_repr(self) -> str:
        """The scale."""
        return f"scale={self.scale}"
