"""Shared routing: one decision for all sparse layers of a stack (Mobile V-MoE)."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router
from moeify.routers.topk import TopK
from moeify.routing import Routing


class SharedRouting(Router):
    """Decides in the first sparse layer of a stack for all of its layers (Mobile V-MoE, arXiv 2309.04354).

    `sparsify` gives the further layers of the stack a `ReusedRouting`. The model then loads the same experts in every
    layer; with `TopK(per="sequence")` inside, one set of experts per image.

    Args:
        router: the wrapped router, which decides.
    """

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router
        self.causal, self.weights_sum_to_one = router.causal, router.weights_sum_to_one

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Routing:
        """Decide, and leave the decision in the context."""
        context.call.decisions[self] = routing = self.router(x, context)
        return routing

    def link_to(self, previous: Router) -> Router:
        """A `ReusedRouting` of the first layer's router, which replaces this router."""
        return ReusedRouting(previous.shared if isinstance(previous, ReusedRouting) else previous)


class ReusedRouting(Router):
    """Decides as another router did in the same forward pass; it has no parameters.

    Args:
        shared: the router of an earlier layer, which leaves its decisions in the context both share.

    Raises:
        ValueError: in `forward`, if that router has not decided yet, or for tokens of another shape.
    """

    def __init__(self, shared: Router) -> None:
        super().__init__()
        self._shared = (shared,)  # not a submodule: it belongs to its own layer
        self.causal, self.weights_sum_to_one = shared.causal, shared.weights_sum_to_one

    @property
    def shared(self) -> Router:
        """The router that decides."""
        return self._shared[0]

    def rows_per_token(self, tokens: int | None = None) -> float | None:
        """The value of the router that decides."""
        return self.shared.rows_per_token(tokens)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Routing:
        """The shared decision, for the experts of this layer."""
        if self.shared not in context.call.decisions:
            raise ValueError(
                "the router whose decision this layer shares has not decided in this forward pass; run the whole model "
                "with one context for both layers"
            )
        routing = context.call.decisions[self.shared]
        if not routing.fits(x.shape[:-1]):
            raise ValueError(
                f"the decision that this layer shares is for tokens of shape {tuple(routing.shape)}, and it was given "
                f"{tuple(x.shape[:-1])}; let layers of different shapes decide for themselves"
            )
        return routing.for_other_experts()


@register("router", "shared_routing")
def shared_routing(width: int, num_experts: int, *, router: Callable[[int, int], Router] = TopK) -> SharedRouting:
    """A `SharedRouting` around the router that `router(width, num_experts)` makes, for recipes."""
    return SharedRouting(router(width, num_experts))
