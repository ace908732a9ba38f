"""Expert weights that are an input of the model, computed outside of the layer (X-LoRA)."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, Tokens, real_tokens
from moeify.routing import Assignment


@register("router", "input_weights")
class InputWeights(Router):
    """Weights that the model was called with, per token or sequence, the same in all layers or of each layer.

        with extra_inputs(model, adapter_weights=weights):
            model(...)

    No expert runs for a weight of 0. `moeify.compose.XLoRA` computes the weights in a pass of its own.

    Args:
        width: D; the decision does not look at the tokens.
        num_experts: E.
        key: the name of the weights: of each token (B, N, E), or in each layer (B, N, layers, E); of each sequence
            (B, E); of all experts alike (B,) or a single number.

    Attributes:
        number: which of the layers this is, for weights that differ by layer.

    Raises:
        ValueError: in `forward`, weights that the model was not called with, or that fit neither tokens nor sequences.
    """

    def __init__(self, width: int, num_experts: int, *, key: str = "adapter_weights") -> None:
        super().__init__()
        self.num_experts, self.k, self.key, self.number = num_experts, num_experts, key, 0

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Give every real token the experts whose weight is not 0."""
        tokens = real_tokens(x, context)
        weights = context.look_up(self.key)
        if weights is None:
            raise ValueError(
                f"this router reads {self.key!r}, but the model was called without it; call it under "
                f"moeify.context.extra_inputs(model, {self.key}=weights), or through XLoRA"
            )
        weights = self._of_tokens(weights.float(), tokens)
        return tokens.assign_where(weights != 0, weights)

    def _of_tokens(self, weights: Float[Tensor, "..."], tokens: Tokens) -> Float[Tensor, "T E"]:
        if weights.dim() == 4:
            weights = weights[:, :, self.number if weights.shape[2] > 1 else 0]
        sequences = int(tokens.sequence_id.max()) + 1
        if weights.dim() == 0:
            return weights.expand(len(tokens.x), self.num_experts)
        if weights.dim() == 1 and len(weights) >= sequences:
            return weights[tokens.sequence_id].unsqueeze(-1).expand(-1, self.num_experts)
        if weights.dim() == 2 and weights.shape[1] == self.num_experts and len(weights) >= sequences:
            return weights[tokens.sequence_id]
        flat = weights.reshape(-1, weights.shape[-1])
        if weights.dim() == 3 and flat.shape == (math.prod(tokens.shape), self.num_experts):
            return flat if tokens.positions is None else flat[tokens.positions]
        raise ValueError(
            f"{self.key!r} has shape {tuple(weights.shape)}, which fits neither the tokens {tuple(tokens.shape)} of "
            f"the layer nor their sequences, each with {self.num_experts} experts"
        )

    def extra_repr(self) -> str:
        """What it reads."""
        return f"experts={self.num_experts}, key={self.key!r}"
