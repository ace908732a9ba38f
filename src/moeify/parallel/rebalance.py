"""Moving experts while a model trains: only where what is saved until the end outweighs the move itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from moeify.parallel.cluster import Link
from moeify.parallel.cost import GRADIENT, STATE, Step
from moeify.parallel.layout import Layout
from moeify.parallel.place import Placement, permuted, replicated, shadowed

Place = Callable[[Num[Tensor, "L E"], Placement], Placement]
"""Proposes a placement for counted rows, given what lies where."""

AGREED = 0.75
"""Part of the steps seen in which a proposal has to be faster."""

TRUST = 0.25
"""Part of their promise that earlier proposals have to have kept; below it routing is too fast for any placement."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """A change of placement.

    Attributes:
        placement: the new one.
        layers: how many layers change.
        bytes: of parameters and of their optimizer state that are sent, over all processes.
        seconds: of the busiest process.
        saves: seconds a step, as predicted.
    """

    placement: Placement
    layers: int
    bytes: float
    seconds: float
    saves: float


class Placed:
    """The time that sparse layers take in a step under a placement.

    Args:
        step: the model, the cluster and the program.
        layout: how it is trained.
        shadows: an expert that lies on several processes has parameters on one of them alone, which lends them to the
            others in every pass; otherwise each of them trains a replica.
    """

    def __init__(self, step: Step, layout: Layout, *, shadows: bool = False) -> None:
        self.step, self.layout, self.shadows = step, layout, shadows
        self._passes = (3 + layout.recompute) * layout.accumulation
        self._held_bytes = 0.0 if shadows else step.shape.expert_parameters * (2 + STATE) / layout.efsdp

    def seconds(self, placement: Placement, shares: Float[Tensor, "S L E"]) -> Float[Tensor, "S L"]:
        """Of one layer in a whole step, with adding up the gradients of replicas or lending to shadows."""
        rows = placement.rows(self.step.rows(self.layout, shares), once=self.shadows)
        experts, exchanged = self.step.layer_seconds(self.layout, rows)
        more = self._lending(placement) if self.shadows else self._reducing(placement)
        return (experts + exchanged) * self._passes + more

    def move(self, before: Placement, after: Placement) -> tuple[float, Float[Tensor, "L"]]:
        """Bytes over all processes, and seconds of the busiest process of each layer.

        An expert comes from a process of its node, if one holds it; parameters in 16 bits come with their fp32 copy and
        both moments, of which every process of `efsdp` sends its part.
        """
        had, has = before.presence(), after.presence()
        wanted = (has - had).clamp_min(0)
        cluster, ranks = self.step.cluster, before.ranks
        here = min(cluster.devices_per_node, ranks)
        if ranks % here:
            near = torch.zeros_like(wanted)
        else:
            near = wanted * had.unflatten(1, (-1, here)).amax(2).repeat_interleave(here, 1)
        inside, outside = (x.sum(-1) * self._held_bytes for x in (near, wanted - near))
        seconds = inside / cluster.intra.bandwidth + outside / cluster.inter.bandwidth
        latency = cluster.intra.latency * near.sum(-1) + cluster.inter.latency * (wanted - near).sum(-1)
        return float((inside + outside).sum()) * self.layout.efsdp, (seconds + latency).amax(-1)

    def _reducing(self, placement: Placement) -> Float[Tensor, "L"]:
        """Seconds of the all-reduce of gradients of experts that lie on several processes, on the busiest process."""
        several = placement.presence().sum(1).gt(1).gather(1, placement.experts).unflatten(1, (placement.ranks, -1))
        sent = several.sum(-1).amax(-1) * 2 * GRADIENT * self.step.shape.expert_parameters / self.layout.efsdp
        link = self._link(placement.ranks)
        return sent / link.bandwidth + (sent > 0) * link.latency

    def _lending(self, placement: Placement) -> Float[Tensor, "L"]:
        """Seconds of sending weights to shadows and gradients back, in 16 bits, on the busiest process."""
        held, own = placement.held, placement.num_experts // placement.ranks
        lender = held[..., :own].flatten(1).argsort(1).gather(1, held[..., own:].flatten(1)) // own  # (L, R * spare)
        borrower = torch.arange(placement.ranks).repeat_interleave(held.shape[2] - own)
        lent = (lender != borrower).double()
        none = torch.zeros(len(held), placement.ranks, dtype=torch.float64)
        sent, got = none.scatter_add(1, lender, lent), none.index_add(1, borrower, lent)
        most = torch.maximum(sent, got).amax(-1)
        link, passes = self._link(placement.ranks), (2 + self.layout.recompute) * self.layout.accumulation
        return passes * (most * 2 * self.step.shape.expert_parameters / link.bandwidth + (most > 0) * link.latency)

    def _link(self, ranks: int) -> Link:
        cluster = self.step.cluster
        return cluster.intra if ranks <= cluster.devices_per_node else cluster.inter


class Rebalancer:
    """Watches the counts of every step, and moves experts where it pays.

    Every `every` steps it proposes a placement for the counts seen since the last decision. A layer moves if

    - the proposal of the decision before would have been faster by now, and this one would have been, each in three
      quarters of the steps seen since, so that chance does not move experts;
    - what it saves a step, times the steps that are left, but at most as many as were seen, is more than twice the time
      of the move and of what the layer still owes: the time by which its moves made it slower so far than without any.

    What it saves is discounted by what earlier proposals, made or not, really saved in the steps after them, as a part
    of what they promised; below a quarter nothing is moved.

    Args:
        placed: prices placements.
        steps: of the whole training.
        every: steps between decisions.
        spare: slots of a process beyond its share of the experts, for replicas with an optimizer state each, for
            `simulate`; without any, experts change places only.
        shadows: slots of a process for shadows of others' experts, which have none; experts stay where they are.

    Raises:
        ValueError: both replicas and shadows.
    """

    def __init__(self, placed: Placed, *, steps: int, every: int = 10, spare: int = 0, shadows: int = 0) -> None:
        if spare and shadows:
            raise ValueError(
                f"spare={spare} gives hot experts replicas and shadows={shadows} shadows; choose one of them"
            )
        shape, ranks = placed.step.shape, placed.layout.ep
        self.spare = spare
        self.placed = Placed(placed.step, placed.layout, shadows=True) if shadows else placed
        self.steps, self.every = steps, every
        self.static = self.placement = Placement.contiguous(shape.sparse_layers, shape.num_experts, ranks)
        self.place: Place = permuted
        if spare:
            slots, node = shape.num_experts + spare * ranks, placed.step.cluster.devices_per_node
            self.placement = with_spare(self.placement, slots)
            self.place = lambda counts, now: replicated(counts, slots, ranks).aligned(now, 0 if ranks % node else node)
        if shadows:
            self.placement, self.place = with_spare(self.placement, shape.num_experts + shadows * ranks), shadowed
        self.seen = 0
        self._window: list[Float[Tensor, "L E"]] = []
        self._before: Placement | None = None
        self._promised = self._kept = 0.0
        self._owed = torch.zeros(shape.sparse_layers, dtype=torch.float64)

    def observe(self, counts: Num[Tensor, "L E"]) -> Move | None:
        """Take the counts of a step; the move to make before the next one, or None.

        Counts are those of all processes, so that every process decides alike. A returned move is taken to be made.
        """
        self.seen += 1
        self._window.append((counts / counts.sum(-1, keepdim=True).clamp_min(1e-300)).double())
        if self.seen % self.every:
            return None
        window, self._window = torch.stack(self._window), []
        now = self.placed.seconds(self.placement, window)
        if self.placement is not self.static:
            self._owed += (now - self.placed.seconds(self.static, window)).sum(0)
        proposed, before = self.place(window.mean(0), self.placement), self._before
        saved = now - self.placed.seconds(proposed, window)
        self._before = proposed
        if before is None:
            self._promised += float(saved.mean(0).sum())
            return None
        held = now - self.placed.seconds(before, window)
        self._kept += float(held.mean(0).sum())
        trust = min(max(self._kept / max(self._promised, 1e-12), 0.0), 1.0)
        self._promised += float(saved.mean(0).sum())
        _, takes = self.placed.move(self.placement, proposed)
        left = min(self.steps - self.seen, self.seen)
        pays = (trust >= TRUST) & (trust * saved.mean(0) * left > 2 * (takes + self._owed.clamp_min(0)))
        for each in (held, saved):
            pays &= (each > 0).double().mean(0) >= AGREED
        return self._made(pays, proposed, trust * saved.mean(0)) if pays.any() else None

    def _made(self, pays: Bool[Tensor, "L"], proposed: Placement, saved: Float[Tensor, "L"]) -> Move:
        placement = self.placement.only(pays, proposed)
        sent, takes = self.placed.move(self.placement, placement)
        self.placement = placement
        self._owed += takes
        return Move(
            placement=placement, layers=int(pays.sum()), bytes=sent, seconds=float(takes.sum()),
            saves=float(saved[pays].sum()),
        )  # fmt: skip


def with_spare(placement: Placement, slots: int) -> Placement:
    """The placement with more slots a process, in which its own first experts lie once more: nothing has to be sent."""
    held = placement.held
    spare = slots // placement.ranks - held.shape[2]
    more = held[:, :, torch.arange(spare) % held.shape[2]]
    return Placement(torch.cat([held, more], 2).flatten(1), placement.ranks, placement.num_experts)
