"""Capacity: a bound on the rows that an expert accepts, put around any token-choice router."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from moeify.capacity import Overflow, Priority, Slots, limit, per_choice
from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router
from moeify.routers.topk import TopK
from moeify.routing import Assignment


class Capacity(Router):
    """Drops or moves the rows of another router's decisions that exceed the capacity of an expert.

    Args:
        router: the router whose decisions are limited; it must give `Assignment`s.
        factor: capacity factor in training.
        eval_factor: capacity factor in evaluation.
        capacity: the formula that turns a factor into slots: papers disagree by more than a factor of two.
        priority: which rows are kept, see `moeify.capacity.limit`.
        overflow: what happens to a token that lost a row, see `moeify.capacity.limit`; with `next` the slots that
            are free for an earlier token depend on later ones.
        per: whether an expert's slots are for the whole batch, or for each sequence or image (`sequence`).
    """

    def __init__(
        self,
        router: Router,
        *,
        factor: float = 1.25,
        eval_factor: float = 2.0,
        capacity: Slots = per_choice,
        priority: Priority = "position",
        overflow: Overflow = "zero",
        per: Literal["batch", "sequence"] = "batch",
    ) -> None:
        super().__init__()
        self.router = router
        self.factor = factor
        self.eval_factor = eval_factor
        self.capacity = capacity
        self.priority: Priority = priority
        self.overflow: Overflow = overflow
        self.per: Literal["batch", "sequence"] = per
        self.causal = router.causal and priority == "position" and overflow != "next"

    def link_to(self, previous: Router) -> Router:
        """Link the wrapped router to the one that the previous layer's router wraps."""
        assert isinstance(previous, Capacity)
        self.router = self.router.link_to(previous.router)
        return self

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Decide as the wrapped router does, then keep at most the capacity of every expert."""
        routing = self.router(x, context)
        k = max(1, round(routing.source.shape[0] / routing.tokens))  # on average, where the number varies
        factor = self.factor if self.training else self.eval_factor
        slots = self.capacity(factor, self._scope(routing), routing.counts.shape[0], k)
        return limit(routing, slots, priority=self.priority, overflow=self.overflow, per=self.per)

    def _scope(self, routing: Assignment) -> int:
        """The tokens that a capacity is for: those of the batch, or of the largest sequence."""
        if self.per == "batch" or routing.sequence_id is None:
            return routing.tokens
        return int(routing.sequence_id.unique(return_counts=True)[1].max())


@register("router", "capacity")
def capacity(
    width: int,
    num_experts: int,
    *,
    router: Callable[[int, int], Router] = TopK,
    factor: float = 1.25,
    eval_factor: float = 2.0,
    capacity: Slots = per_choice,
    priority: Priority = "position",
    overflow: Overflow = "zero",
    per: Literal["batch", "sequence"] = "batch",
) -> Capacity:
    """A `Capacity` around the router that `router(width, num_experts)` makes, for recipes."""
    return Capacity(
        router(width, num_experts),
        factor=factor, eval_factor=eval_factor, capacity=capacity, priority=priority, overflow=overflow,
        per=per,
    )  # fmt: skip
