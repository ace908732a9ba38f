"""A router that reads tokens at equal lengths (Gemma 4)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, real_tokens
from moeify.routers.topk import TopK
from moeify.routing import Routing


class NormalizedInput(Router):
    """The wrapped router reads a ⊙ x / rms(x) / sqrt(D), with a learned a, instead of x (Gemma 4); experts read x.

    The logits of tokens then depend on their direction and not on their length.

    Args:
        router: the wrapped router.
        width: D.
        eps: added to the mean of squares.
    """

    def __init__(self, router: Router, width: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.router, self.eps = router, eps
        self.causal, self.weights_sum_to_one = router.causal, router.weights_sum_to_one
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Routing:
        """Decide by the normalised tokens."""
        tokens = real_tokens(x, context)
        exact = tokens.x.float()
        normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        read = normed * self.gain * x.shape[-1] ** -0.5
        if tokens.positions is not None:
            read = read.new_zeros(math.prod(tokens.shape), x.shape[-1]).index_put((tokens.positions,), read)
        return self.router(read.view(x.shape), context)


@register("router", "normalized_input")
def normalized_input(
    width: int, num_experts: int, *, router: Callable[[int, int], Router] = TopK, eps: float = 1e-6
) -> NormalizedInput:
    """A `NormalizedInput` around the router that `router(width, num_experts)` makes, for recipes."""
    return NormalizedInput(router(width, num_experts), width, eps=eps)
