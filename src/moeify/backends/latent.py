"""Backend for `Latent` experts: both projections once per token, and the experts between them by another backend."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from moeify.backends.base import needs_rows_only, waits_for_call
from moeify.experts.base import Experts
from moeify.experts.latent import Latent
from moeify.routing import Routing

Layer = Callable[[Tensor, Routing, Experts], Tensor]


def run(x: Float[Tensor, "... D"], routing: Routing, experts: Experts, *, inside: Layer) -> Tensor:
    """`up(inside(down(x)))`, which equals the definition because dispatch, combine and both projections are linear.

    Args:
        x: the tokens.
        routing: the routing decision.
        experts: the `Latent` experts.
        inside: computes the layer of the experts between the projections.
    """
    assert isinstance(experts, Latent)
    return experts.up(inside(experts.down(x), routing, experts.experts))


def refuse(x: Tensor, routing: Routing, experts: Experts) -> str | None:
    """The reason why this backend does not support a call, None if it does."""
    if not isinstance(experts, Latent):
        return f"it needs Latent experts, and these are {type(experts).__name__}"
    if waits_for_call(experts):
        return "it computes the projections without calling the experts, so their hooks would not run"
    return needs_rows_only(routing)
