"""Capacity: a bound on the rows that an expert accepts, put around any token-choice router."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router
from moeify.routing import Assignment, Overflow, Priority, Slots, limit, per_choice


@register("router", "capacity")
class Capacity(Router):
    """Drops what exceeds an expert's capacity from the decisions of another router.

    Args:
        router: the router whose decisions are limited; it must give `Assignment`s.
        factor: capacity factor in training.
        eval_factor: capacity factor in evaluation.
        capacity: the formula that turns a factor into slots: papers disagree by more than a factor of two.
        priority: who is kept, see `moeify.routing.limit`.
        overflow: what happens to the other weights of a token that lost a row, see `moeify.routing.limit`.
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
    ) -> None:
        super().__init__()
        self.router = router
        self.factor = factor
        self.eval_factor = eval_factor
        self.capacity = capacity
        self.priority: Priority = priority
        self.overflow: Overflow = overflow
        self.causal = router.causal and priority == "position"

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Decide as the inner router does, then keep at most the capacity of every expert."""
        routing = self.router(x, context)
        tokens = len(routing.group) if routing.group is not None else math.prod(routing.shape)
        num_experts, rows = routing.counts.shape[0], routing.source.shape[0]
        factor = self.factor if self.training else self.eval_factor
        slots = self.capacity(factor, tokens, num_experts, max(1, round(rows / tokens)))
        return limit(routing, slots, priority=self.priority, overflow=self.overflow)
