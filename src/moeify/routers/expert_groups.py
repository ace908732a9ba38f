"""Groups of experts that limit a token's choice: its best groups only (DeepSeek), or as many of every group (MoGE)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.registry import register
from moeify.routers.base import best_indices


@dataclass(frozen=True)
class GroupLimit(ABC):
    """Which experts a token may choose, by groups of adjacent experts of equal size.

    Attributes:
        count: number of groups.
    """

    count: int

    @abstractmethod
    def __call__(self, choice: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """The scores by which experts are chosen, without those that a token may not use."""

    def check(self, num_experts: int, k: int) -> None:
        """Refuse numbers of experts that do not fit the groups.

        Raises:
            ValueError: groups that do not divide E, or that leave other than k experts to choose.
        """
        if self.count < 1 or num_experts % self.count:
            raise ValueError(f"{num_experts} experts cannot be divided into {self.count} groups of equal size")


@register("expert_groups", "expert_groups")
@dataclass(frozen=True)
class ExpertGroups(GroupLimit):
    """Group-limited routing: a token may only use experts of its best groups (DeepSeek-V2 and V3).

    Attributes:
        count: number of groups.
        keep: groups that a token may use.
        reduce: the score of a group: that of its best expert (`max`, V2) or the sum of its two best (`top2`, V3).
        fill: the score of experts in the other groups: -inf, so that they cannot be chosen.
    """

    keep: int
    reduce: Literal["max", "top2"] = "max"
    fill: float = float("-inf")

    def __call__(self, choice: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Fill the scores of the experts in all but each token's best groups."""
        by_group = choice.unflatten(-1, (self.count, -1))  # (T, count, E / count)
        best = 1 if self.reduce == "max" else min(2, by_group.shape[-1])
        score = by_group.topk(best, dim=-1).values.sum(-1)
        kept = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best_indices(score, self.keep), True)
        return by_group.masked_fill(~kept.unsqueeze(-1), self.fill).flatten(-2)

    def check(self, num_experts: int, k: int) -> None:
        """Refuse fewer groups than `keep`, groups that do not divide E, and fewer than k experts in those kept."""
        if not 1 <= self.keep <= self.count:
            raise ValueError(f"a token cannot use {self.keep} of {self.count} groups; choose 1 <= keep <= count")
        super().check(num_experts, k)
        size = num_experts // self.count
        if self.keep * size < k:
            raise ValueError(f"{self.keep} groups of {size} experts leave fewer than k={k} to choose from")


@register("expert_groups", "per_group")
@dataclass(frozen=True)
class PerGroup(GroupLimit):
    """As many experts of every group: k / count of each (MoGE, Pangu Pro MoE, arXiv 2505.21411).

    With one group per device all devices have the same number of rows, whatever the router learns.

    Attributes:
        count: number of groups.
        each: experts that a token uses in each group.
    """

    each: int = 1

    @property
    def keep(self) -> int:
        """Groups that a token may use: all."""
        return self.count

    def __call__(self, choice: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """Leave the scores of the best experts of every group, and -inf in place of the others."""
        by_group = choice.unflatten(-1, (self.count, -1))  # (T, count, E / count)
        kept = torch.zeros_like(by_group, dtype=torch.bool).scatter(-1, best_indices(by_group, self.each), True)
        return by_group.masked_fill(~kept, float("-inf")).flatten(-2)

    def check(self, num_experts: int, k: int) -> None:
        """Refuse a k other than `count · each`, groups that do not divide E, and groups of fewer than `each`."""
        super().check(num_experts, k)
        if self.each < 1 or k != self.count * self.each:
            raise ValueError(
                f"{self.each} experts of each of {self.count} groups are {self.count * self.each} per token, and "
                f"k={k}; choose k = count · each"
            )
        if self.each > num_experts // self.count:
            raise ValueError(f"a group of {num_experts // self.count} experts has fewer than each={self.each}")
