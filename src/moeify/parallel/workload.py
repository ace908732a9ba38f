"""How routers spread rows over experts: balanced, skewed, recorded from a model, or read from a trace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from moeify.routing import Routing

ROWS = 100
"""Rows per expert from which on the shares of a snapshot say more of the router than of chance."""


class Decided(Protocol):
    """What is read of a layer of a trace."""

    @property
    def num_experts(self) -> int:
        """E."""

    @property
    def experts(self) -> Int[Tensor, "T K"]:
        """The experts of every token, -1 where it has fewer than K."""


@dataclass(frozen=True, eq=False)
class Workload:
    """The share of the rows of a layer that each expert gets, in S snapshots of L layers.

    Attributes:
        shares: they sum to 1 over experts. One layer stands for all layers of a model.
    """

    shares: Float[Tensor, "S L E"]

    def __post_init__(self) -> None:
        if self.shares.dim() != 3 or not self.shares.numel():
            raise ValueError(f"shares have shape {tuple(self.shares.shape)}; they need snapshots, layers and experts")
        if (self.shares < 0).any() or not torch.allclose(self.shares.sum(-1), torch.ones_like(self.shares[..., 0])):
            raise ValueError("shares of experts must be at least 0 and sum to 1; see Workload.counted")

    @classmethod
    def balanced(cls, num_experts: int) -> Workload:
        """Every expert gets as much as any other."""
        return cls(torch.full((1, 1, num_experts), 1 / num_experts, dtype=torch.float64))

    @classmethod
    def skewed(cls, num_experts: int, skew: float, *, layers: int = 1, seed: int = 0) -> Workload:
        """Shares by Zipf's law, in another order in every layer: the expert of rank r gets as much as 1 / r^skew.

        Args:
            num_experts: E.
            skew: 0 is balanced; at 1 the first of 64 experts gets 13 times its fair share.
            layers: L.
            seed: of the orders.
        """
        generator = torch.Generator().manual_seed(seed)
        shares = torch.arange(1, num_experts + 1, dtype=torch.float64) ** -skew
        orders = torch.stack([torch.randperm(num_experts, generator=generator) for _ in range(layers)])
        return cls((shares / shares.sum())[orders][None])

    @classmethod
    def counted(cls, counts: Num[Tensor, "S L E"]) -> Workload:
        """The shares of counted rows; a layer without a row counts as balanced."""
        counts = counts.double()
        total = counts.sum(-1, keepdim=True)
        return cls(torch.where(total > 0, counts / total.clamp_min(1e-300), 1 / counts.shape[-1]))

    @classmethod
    def recorded(cls, routings: Mapping[str, Routing]) -> Workload:
        """The decisions of one forward pass, as `moeify.record` yields them.

        Raises:
            ValueError: nothing was recorded, or layers have different numbers of experts.
        """
        return cls.counted(_stacked([routing.counts for routing in routings.values()])[None])

    @classmethod
    def traced(cls, layers: Iterable[Decided], *, snapshots: int | None = None) -> Workload:
        """The decisions of a trace, as `moeify.inspect` reads them, whose tokens are cut in order into snapshots.

        Args:
            layers: of the trace, or the trace itself.
            snapshots: S; by default as many as leave 100 rows per expert to each, for fewer look skewed by chance.

        Raises:
            ValueError: the trace has no layer, or layers with different numbers of experts.
        """
        found = []
        for layer in layers:
            most = snapshots or layer.experts.numel() // (ROWS * layer.num_experts)
            parts = layer.experts.long().tensor_split(max(1, min(most, len(layer.experts))))
            found.append(torch.stack([part[part >= 0].bincount(minlength=layer.num_experts) for part in parts]))
        if len({len(counts) for counts in found}) > 1:
            found = [counts.sum(0, keepdim=True) for counts in found]
        return cls.counted(_stacked(found).movedim(0, 1))

    @property
    def num_experts(self) -> int:
        """E."""
        return self.shares.shape[-1]

    @property
    def hottest(self) -> float:
        """Mean over snapshots and layers of the fullest expert's load, in units of the mean load."""
        return float(self.shares.amax(-1).mean()) * self.num_experts

    def stretched(self, num_experts: int) -> Workload:
        """The workload for another number of experts, where neighbouring experts share what one had.

        The same part of the experts, such as those of a process, has the same part of the rows.
        """
        below = torch.nn.functional.pad(self.shares.cumsum(-1), (1, 0))
        place = torch.arange(num_experts + 1, dtype=torch.float64) * (self.num_experts / num_experts)
        left = place.long().clamp_max(self.num_experts - 1)
        curve = below[..., left].lerp(below[..., left + 1], place - left)
        return Workload.counted(curve.diff(dim=-1).clamp_min(0))

    def mean(self) -> Workload:
        """One snapshot: the mean of all."""
        return Workload(self.shares.mean(0, keepdim=True))

    def capped(self, factor: float) -> Workload:
        """The shares that are left of a capacity of `factor` times the mean load: experts above it are cut to it."""
        shares = self.shares.clamp_max(max(factor, 1.0) / self.num_experts)
        return Workload(shares / shares.sum(-1, keepdim=True))

    def kept(self, factor: float) -> float:
        """The part of the rows that a capacity of `factor` times the mean load keeps, over all layers."""
        return float(self.shares.clamp_max(factor / self.num_experts).sum(-1).mean())


def _stacked(counts: list[Num[Tensor, "... E"]]) -> Num[Tensor, "L ... E"]:
    if not counts:
        raise ValueError("there is no sparse layer whose decisions could be counted")
    if len(sizes := {c.shape[-1] for c in counts}) > 1:
        raise ValueError(
            f"layers have {', '.join(map(str, sorted(sizes)))} experts; choose those of one size by `only` of the trace"
        )
    return torch.stack([c.to("cpu") for c in counts])
