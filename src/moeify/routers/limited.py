"""Capacity: a bound on the rows that an expert accepts, put around any token-choice router."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeify.capacity import Count, Overflow, Per, Priority, Slots, group_of_rows, limit, per_choice
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
        eval_factor: capacity factor in evaluation; infinite, as `factor` may be, for none.
        capacity: the formula that turns a factor into slots: papers disagree by more than a factor of two.
        priority: which rows are kept, see `moeify.capacity.limit`.
        overflow: what happens to a token that lost a row, see `moeify.capacity.limit`; with `next` the slots that
            are free for an earlier token depend on later ones.
        per: whether an expert's slots are for the whole batch, for each sequence or image (`sequence`), for groups of
            consecutive ones (a number: V-MoE's groups have 8 images), or for the tokens of a sequence up to each one
            (`prefix`). Only the last depends on no later token at all: the slots of a batch, a group or a sequence grow
            with its tokens, so that more of an earlier one is kept where more follow.
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
        per: Per = "batch",
    ) -> None:
        super().__init__()
        self.router = router
        self.factor = factor
        self.eval_factor = eval_factor
        self.capacity = capacity
        self.overflow: Overflow = overflow
        self.per: Per = per
        self.keep_by(priority)

    def keep_by(self, priority: Priority) -> None:
        """Set which rows are kept, and whether a later token may so take an earlier one's place."""
        self.priority: Priority = priority
        self.causal = self.router.causal and priority == "position" and self.overflow != "next"

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Decide as the wrapped router does, then keep at most the capacity of every expert."""
        routing = self.router(x, context)
        factor = self.factor if self.training else self.eval_factor
        if math.isinf(factor):
            return routing
        if self.per == "batch":
            slots = self._slots(routing, factor, routing.tokens, routing.num_rows)
        elif self.per == "prefix":
            slots = self._slots_of_prefixes(routing, factor)
        else:
            group, tokens = group_of_rows(routing, self.per)
            slots = self._slots_of_groups(routing, factor, group, tokens)
        return limit(routing, slots, priority=self.priority, overflow=self.overflow, per=self.per)

    def _slots(self, routing: Assignment, factor: float, tokens: Count, rows: Count) -> Count:
        """The capacity of an expert, from the numbers of tokens and rows."""
        k = max(1, round(rows / tokens)) if routing.choices is None else routing.choices.k  # on average, if it varies
        return self.capacity(factor, tokens, len(routing.counts), k)

    def _slots_of_groups(
        self, routing: Assignment, factor: float, group: Int[Tensor, "R"], tokens: Int[Tensor, "B"]
    ) -> Count:
        """The capacity of an expert in every group."""
        if torch.compiler.is_exporting():  # the formula for all groups at once, as their number is open
            return self._slots(routing, factor, tokens.double(), routing.num_rows)
        rows = group.bincount(minlength=len(tokens))
        return [self._slots(routing, factor, *each) for each in zip(tokens.tolist(), rows.tolist(), strict=True)]

    def _slots_of_prefixes(self, routing: Assignment, factor: float) -> Count:
        """The capacity of an expert for the first token of a sequence, the first two, ..."""
        if routing.choices is None:
            raise ValueError("a capacity per prefix needs a router that gives every token the same number of experts")
        if torch.compiler.is_exporting():
            lengths = torch.arange(1, routing.shape[1] + 1, dtype=torch.float64, device=routing.counts.device)
            return self._slots(routing, factor, lengths, routing.num_rows)
        longest = int(group_of_rows(routing, "sequence")[1].max())
        return [self.capacity(factor, n, len(routing.counts), routing.choices.k) for n in range(1, longest + 1)]

    def extra_repr(self) -> str:
        """The factors, the formula, the priority and the overflow."""
        return (
            f"factor={self.factor}, eval_factor={self.eval_factor}, capacity={self.capacity.__name__}, "
            f"priority={self.priority!r}, overflow={self.overflow!r}, per={self.per!r}"
        )


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
    per: Per = "batch",
) -> Capacity:
    """A `Capacity` around the router that `router(width, num_experts)` makes, for recipes."""
    return Capacity(
        router(width, num_experts),
        factor=factor, eval_factor=eval_factor, capacity=capacity, priority=priority, overflow=overflow,
        per=per,
    )  # fmt: skip
