"""One decision for all sparse layers of a stack."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router
from moeify.routers.topk import TopK
from moeify.routing import Routing


class Once(Router):
    """Decides in the first sparse layer of a stack what the others follow (Mobile V-MoE, arXiv 2309.04354).

    `sparsify` gives the further layers of the stack a `Follow`. The model then loads the same experts in every layer;
    with `TopK(per="group")` inside, one set of experts per image.

    Args:
        router: decides.
    """

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router
        self.causal, self.preserving = router.causal, router.preserving

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Routing:
        """Decide, and leave the decision in the context."""
        context.call.decisions[self] = routing = self.router(x, context)
        return routing

    def follow(self, previous: Router) -> Router:
        """A `Follow` of the first layer's router, in the place of this one."""
        return Follow(previous.leader if isinstance(previous, Follow) else previous)


class Follow(Router):
    """Decides as another router did in the same forward pass; it has no parameters.

    Args:
        leader: the router of an earlier layer, which leaves its decisions in the context both share.

    Raises:
        ValueError: in `forward`, if the leader has not decided yet, or for tokens of another shape.
    """

    def __init__(self, leader: Router) -> None:
        super().__init__()
        self._leader = (leader,)  # not a submodule: it belongs to its own layer
        self.causal, self.preserving = leader.causal, leader.preserving

    @property
    def leader(self) -> Router:
        """The router that decides."""
        return self._leader[0]

    def rows_per_token(self, tokens: int | None = None) -> float | None:
        """Those of the leader."""
        return self.leader.rows_per_token(tokens)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Routing:
        """The leader's decision, for the experts of this layer."""
        if self.leader not in context.call.decisions:
            raise ValueError(
                "the router that this layer follows has not decided in this forward pass; run the whole model, with "
                "one context for both layers"
            )
        routing = context.call.decisions[self.leader]
        if not routing.fits(x.shape[:-1]):
            raise ValueError(
                f"the decision that this layer follows is for tokens of shape {tuple(routing.shape)}, and it was given "
                f"{tuple(x.shape[:-1])}; let layers of different shapes decide for themselves"
            )
        return routing.for_other_experts()


@register("router", "once")
def once(width: int, num_experts: int, *, router: Callable[[int, int], Router] = TopK) -> Once:
    """A `Once` around the router that `router(width, num_experts)` makes, for recipes."""
    return Once(router(width, num_experts))
