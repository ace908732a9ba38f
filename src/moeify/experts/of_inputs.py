"""Experts that each read one of several inputs of a token (PLE, progressive layered extraction)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeify.experts.base import Experts, cut


class OfInputs(Experts):
    """Gives every expert one of the inputs that are concatenated in a row.

    Args:
        experts: the experts, which read one input.
        reads: the index of the input that each expert reads, from 0.
        inputs: how many there are.

    Raises:
        ValueError: not one index per expert, or an index outside the inputs.
    """

    def __init__(self, experts: Experts, reads: Sequence[int], inputs: int) -> None:
        super().__init__()
        if len(reads) != experts.num_experts or not all(0 <= place < inputs for place in reads):
            raise ValueError(
                f"{experts.num_experts} experts read the inputs {list(reads)} of {inputs}; give each the place of one, "
                "from 0"
            )
        self.experts, self.inputs, self.num_experts = experts, inputs, experts.num_experts
        self.register_buffer("reads", torch.tensor(reads), persistent=False)

    @property
    def costs(self) -> Float[Tensor, "E"]:
        """The cost of a row at each wrapped expert, relative to the most expensive."""
        return self.experts.costs

    def part(self, first: int, last: int) -> OfInputs:
        """The experts `first` to `last - 1` alone."""
        return cut(self, first, last)

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """Run every expert on its input."""
        place = self.reads.repeat_interleave(counts, output_size=len(rows))
        row = torch.arange(len(rows), device=rows.device)
        return self.experts(rows.unflatten(-1, (self.inputs, -1))[row, place], counts)

    def extra_repr(self) -> str:
        """Which input each expert reads."""
        return f"reads={self.reads.tolist()}"
