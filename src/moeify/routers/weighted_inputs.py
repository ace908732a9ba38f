"""Weights that multiply what experts read, instead of what they compute (Llama 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router
from moeify.routers.topk import TopK
from moeify.routing import Assignment


class WeightedInputs(Router):
    """y = Σ_j E_j(g_j · x), where other routers compute Σ_j g_j · E_j(x) (Llama 4, with g_j = sigmoid(w_j · x)).

    Choices and evidence are those of the wrapped router, and so are the weights in `choices`; every row counts once in
    the sum.

    Args:
        router: the wrapped router, which gives an `Assignment` with one weight per row.

    Raises:
        ValueError: in `forward`, a decision of another type.
    """

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router
        self.causal = router.causal

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Decide, and let the weights multiply the rows that the experts read."""
        routing = self.router(x, context)
        if not isinstance(routing, Assignment) or routing.has_gate_axis or routing.expert_outputs is not None:
            raise ValueError(
                f"{type(self.router).__name__} does not give one weight to every row before its expert runs, so no "
                "weight can multiply what experts read; wrap a router such as TopK"
            )
        return replace(routing, weight=torch.ones_like(routing.weight), input_weight=routing.weight)


@register("router", "weighted_inputs")
def weighted_inputs(width: int, num_experts: int, *, router: Callable[[int, int], Router] = TopK) -> WeightedInputs:
    """A `WeightedInputs` around the router that `router(width, num_experts)` makes, for recipes."""
    return WeightedInputs(router(width, num_experts))
