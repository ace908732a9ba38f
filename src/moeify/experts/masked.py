"""Expert output masking: whole outputs of experts are dropped in training (NLLB)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeify.experts.base import Experts, cut


class Masked(Experts):
    """Drops whole expert outputs in training: a row becomes 0 with probability p, else it is scaled by 1 / (1 - p).

    Expert output masking (NLLB, arXiv 2207.04672, section 6.2.1): a token loses none, some or all of its experts. In
    expectation nothing changes, so evaluation takes the outputs as they are.

    Args:
        experts: the experts whose outputs are masked.
        p: probability that an output is dropped; NLLB uses 0.2.

    Raises:
        ValueError: p outside [0, 1).
    """

    def __init__(self, experts: Experts, p: float = 0.2) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p={p} is not a probability; choose 0 <= p < 1")
        self.experts, self.p = experts, p
        self.num_experts = experts.num_experts

    @property
    def costs(self) -> Float[Tensor, "E"]:
        """The cost of a row at each masked expert, relative to the most expensive."""
        return self.experts.costs

    def part(self, first: int, last: int) -> Masked:
        """The experts `first` to `last - 1` alone."""
        return cut(self, first, last)

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """Run the experts, and mask their outputs in training."""
        outputs = self.experts(rows, counts)
        if not self.training or self.p == 0:
            return outputs
        kept = torch.rand(len(rows), 1, device=rows.device) >= self.p
        return outputs * kept / (1 - self.p)

    def extra_repr(self) -> str:
        """The drop probability p."""
        return f"p={self.p}"
