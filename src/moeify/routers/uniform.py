"""All experts with fixed weights, the same for every token: uniform, or one number per expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, real_tokens
from moeify.routing import Assignment


@register("router", "uniform")
class Uniform(Router):
    """y = Σ_j w_j E_j(x) with w_j = 1 / E, or weights of your own; with E = 1 the expert as it is.

    Of low-rank experts it is the merge of adapters that is exact, computed without merging: Σ_j w_j B_j A_j.

    Args:
        width: D; the decision does not look at the tokens.
        num_experts: E.
        weights: w, of any sign and sum.

    Raises:
        ValueError: not one weight per expert.
    """

    def __init__(self, width: int, num_experts: int, *, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = [1 / num_experts] * num_experts if weights is None else list(weights)
        if len(weights) != num_experts:
            raise ValueError(f"{len(weights)} weights for {num_experts} experts; give one weight per expert")
        self.num_experts = self.k = num_experts
        self.weights_sum_to_one = abs(sum(weights) - 1) < 1e-6
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Give every real token to all experts."""
        tokens = real_tokens(x, context)
        indices = torch.arange(self.num_experts, device=x.device).expand(len(tokens.x), -1)
        return tokens.assign(indices, self.weights.expand(len(tokens.x), -1), self.num_experts)

    @property
    def keeps_scores(self) -> bool:
        """False: the weights are fixed."""
        return False

    def extra_repr(self) -> str:
        """The weights."""
        return f"weights={[round(weight, 3) for weight in self.weights.tolist()]}"
