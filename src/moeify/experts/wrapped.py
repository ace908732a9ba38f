"""Experts inside another module that changes what a call of them computes, such as an adapter of PEFT."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.experts.base import Experts


class Wrapped(Experts):
    """A module around experts, called as experts are; no kernel reads the weights inside.

    Args:
        module: has the module that it wraps as `base_layer`, as the layers of PEFT have it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        inside: Any = module
        while not isinstance(inside, Experts):
            inside = inside.base_layer
        self.num_experts = inside.num_experts

    def part(self, first: int, last: int) -> Wrapped:
        """Refuse to be divided.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"experts inside {type(self.module).__name__}, a module around them, cannot be divided among processes; "
            "merge the adapter first, or put adapters around the parallel experts"
        )

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """Call the module."""
        return self.module(rows, counts)


def as_experts(module: nn.Module) -> Experts:
    """The module itself if it is experts, else the experts inside it, still wrapped."""
    return module if isinstance(module, Experts) else Wrapped(module)
