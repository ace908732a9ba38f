"""A learned scale of every expert's weights (Gemma 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router
from moeify.routers.topk import TopK
from moeify.routing import Assignment


class ExpertScale(Router):
    """y = Σ_j c_j g_j · E_j(x), with the weights g of the wrapped router and a learned c, 1 at first (Gemma 4).

    Choices and evidence are those of the wrapped router.

    Args:
        router: the wrapped router, which gives an `Assignment` with one weight per row.
        num_experts: E.

    Raises:
        ValueError: in `forward`, a decision of another type.
    """

    def __init__(self, router: Router, num_experts: int) -> None:
        super().__init__()
        self.router, self.num_experts = router, num_experts
        self.causal = router.causal
        self.weights_sum_to_one = router.weights_sum_to_one  # as layers are made, before the scale is trained
        self.scale = nn.Parameter(torch.ones(num_experts))

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Decide, and multiply the weights."""
        routing = self.router(x, context)
        if not isinstance(routing, Assignment) or routing.has_gate_axis:
            raise ValueError(
                f"{type(self.router).__name__} does not give one weight to every row, so no scale of experts can "
                "multiply it; wrap a router such as TopK"
            )
        choices, scale = routing.choices, self.scale.to(routing.weight.dtype)
        if choices is not None:
            choices = replace(choices, weights=choices.weights * scale[choices.indices])
        return replace(routing, weight=routing.weight * scale[routing.expert], choices=choices)


@register("router", "expert_scale")
def expert_scale(width: int, num_experts: int, *, router: Callable[[int, int], Router] = TopK) -> ExpertScale:
    """An `ExpertScale` around the router that `router(width, num_experts)` makes, for recipes."""
    return ExpertScale(router(width, num_experts), num_experts)
