"""Scores of logits that cannot grow without bound (Laguna)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from moeify.registry import register


@register("score", "capped_sigmoid")
@dataclass(frozen=True)
class CappedSigmoid:
    """sigmoid(c · tanh(z / c)): a sigmoid whose logits stay between -c and c (Laguna).

    Attributes:
        cap: c.
    """

    cap: float

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise ValueError(f"a cap of {self.cap} leaves no logit; choose one above 0, or score=sigmoid for none")

    @property
    def __name__(self) -> str:
        """As it is printed."""
        return f"capped_sigmoid({self.cap:g})"

    def __call__(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """The scores."""
        return ((logits / self.cap).tanh() * self.cap).sigmoid()
