"""Where experts lie: each process has slots, each slot holds an expert, and a hot expert may lie in several."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Placement:
    """The expert in every slot of every layer; processes have equally many consecutive slots.

    Attributes:
        experts: every expert has a slot, and some may have several.
        ranks: R, a divisor of the number of slots.
        num_experts: E.
    """

    experts: Int[Tensor, "L slots"]
    ranks: int
    num_experts: int

    def __post_init__(self) -> None:
        if self.experts.shape[-1] % self.ranks:
            raise ValueError(f"{self.experts.shape[-1]} slots cannot be shared equally by {self.ranks} processes")
        if (self.replicas == 0).any():
            raise ValueError("an expert has no slot; there are as many slots as experts, or more")

    @classmethod
    def contiguous(cls, layers: int, num_experts: int, ranks: int) -> Placement:
        """One slot per expert, in order, as transformers, torchtitan and Megatron place them."""
        return cls(torch.arange(num_experts).expand(layers, -1), ranks, num_experts)

    @property
    def replicas(self) -> Int[Tensor, "L E"]:
        """Slots of every expert."""
        none = torch.zeros(len(self.experts), self.num_experts, dtype=torch.long)
        return none.scatter_add(1, self.experts, torch.ones_like(self.experts))

    @property
    def held(self) -> Int[Tensor, "L R slots"]:
        """The experts of every process."""
        return self.experts.unflatten(1, (self.ranks, -1))

    def rows(self, counts: Num[Tensor, "... L E"], *, once: bool = False) -> Float[Tensor, "... L R slots"]:
        """Rows of every slot, where the replicas of an expert share its rows equally.

        Args:
            counts: rows of every expert.
            once: processes share the rows of an expert, and a second slot that it has on a process gets none.
        """
        each = counts / (self.presence().sum(1) if once else self.replicas)
        rows = each.gather(-1, self.experts.expand(*each.shape[:-1], -1)).unflatten(-1, (self.ranks, -1))
        if not once:
            return rows
        again = (self.held[..., :, None] == self.held[..., None, :]).tril(-1).any(-1)
        return rows.masked_fill(again, 0.0)

    def load(self, counts: Num[Tensor, "... L E"]) -> Float[Tensor, "... L"]:
        """Rows of the fullest process, in units of the mean process."""
        rows = self.rows(counts).sum(-1)
        return rows.amax(-1) / rows.mean(-1).clamp_min(1e-12)

    def presence(self) -> Float[Tensor, "L R E"]:
        """1 where a process holds an expert."""
        none = torch.zeros(len(self.experts), self.ranks, self.num_experts, dtype=torch.float64)
        return none.scatter(2, self.held, 1.0)

    def only(self, changed: Bool[Tensor, "L"], other: Placement) -> Placement:
        """This placement with the layers that `changed` marks taken from another one of as many slots."""
        return Placement(torch.where(changed[:, None], other.experts, self.experts), self.ranks, self.num_experts)

    def aligned(self, before: Placement, node: int = 0) -> Placement:
        """The placement with its ranks renamed, so that they keep as many experts as possible of another placement.

        Args:
            before: what lies there.
            node: processes of a node, among which names may change; by default all.
        """
        node = node or self.ranks
        common = torch.einsum("lae,lbe->lab", before.presence(), self.presence())
        names = torch.empty(len(self.experts), self.ranks, dtype=torch.long)
        for layer in range(len(self.experts)):
            for first in range(0, self.ranks, node):
                kept = common[layer, first : first + node, first : first + node].clone()
                for _ in range(len(kept)):
                    old, new = divmod(int(kept.argmax()), len(kept))
                    names[layer, first + old] = first + new
                    kept[old, :], kept[:, new] = -1, -1
        held = self.held.gather(1, names[..., None].expand_as(self.held))
        return Placement(held.flatten(1), self.ranks, self.num_experts)


def permuted(counts: Num[Tensor, "L E"], before: Placement) -> Placement:
    """Another order of the experts over the same slots: the fullest first, each to the emptiest process with room.

    An expert stays on its process where that is as empty (SmartMoE, USENIX ATC 2023, the greedy of its pool).
    """
    layers, (ranks, slots) = len(counts), before.held.shape[1:]
    home = before.presence().argmax(1)
    placed = torch.full((layers, ranks, slots), -1)
    for layer in range(layers):
        load, filled = [0.0] * ranks, [0] * ranks
        for expert in counts[layer].argsort(descending=True, stable=True).tolist():
            free = [rank for rank in range(ranks) if filled[rank] < slots]
            stays = int(home[layer, expert])
            rank = min(free, key=lambda r: (load[r], r != stays))
            placed[layer, rank, filled[rank]] = expert
            load[rank], filled[rank] = load[rank] + float(counts[layer, expert]), filled[rank] + 1
    return Placement(placed.flatten(1), ranks, before.num_experts)


def replicated(counts: Num[Tensor, "L E"], slots: int, ranks: int, *, nodes: int = 1, groups: int = 1) -> Placement:
    """Replicas for hot experts, packed so that processes are equally full: EPLB of DeepSeek-V3 (arXiv 2412.19437).

    Groups of experts are packed onto nodes; inside a node a slot after the other goes to the expert with most rows per
    replica; replicas are packed onto processes. With one node, or groups that nodes cannot share, all is one node.

    Args:
        counts: rows, measured or expected.
        slots: over all processes, a multiple of `ranks` and at least E.
        ranks: R.
        nodes: a divisor of `ranks`.
        groups: of experts with neighbouring numbers, from which a token chooses a few.

    Raises:
        ValueError: numbers that do not divide each other.
    """
    layers, num_experts = counts.shape
    if groups % nodes:
        nodes = groups = 1
    if slots % ranks or ranks % nodes or num_experts % groups or slots < num_experts:
        raise ValueError(
            f"{slots} slots, {ranks} processes, {nodes} nodes, {groups} groups and {num_experts} experts do not fit: "
            "slots are a multiple of processes and at least the experts, processes one of nodes, experts one of groups"
        )
    counts, per_node = counts.float(), num_experts // nodes
    order = _packed(counts.unflatten(1, (groups, -1)).sum(-1), nodes)  # groups, node by node
    inside = torch.arange(num_experts).view(groups, -1)
    chosen = inside[order].flatten(1).view(layers * nodes, per_node)  # experts of every node
    rows = counts.gather(1, chosen.view(layers, -1)).view(layers * nodes, per_node)
    copies = torch.ones_like(rows)
    of_slot = torch.arange(per_node).repeat(layers * nodes, 1)
    for _ in range(slots // nodes - per_node):
        hottest = (rows / copies).argmax(1, keepdim=True)
        of_slot = torch.cat([of_slot, hottest], 1)
        copies.scatter_add_(1, hottest, torch.ones_like(hottest, dtype=copies.dtype))
    packed = _packed((rows / copies).gather(1, of_slot), ranks // nodes)
    return Placement(chosen.gather(1, of_slot.gather(1, packed)).view(layers, slots), ranks, num_experts)


def shadowed(counts: Num[Tensor, "L E"], before: Placement) -> Placement:
    """Shadows of hot experts in the slots beside the own ones, where that makes the fullest process emptier.

    While it helps, the hottest expert of the fullest process gets a shadow on the emptiest process with a free slot (in
    FasterMoE, PPoPP 2022, on all processes). Slots that stay free hold the coldest expert of their own process again.

    Args:
        counts: rows, measured or expected.
        before: every process's own E / ranks experts in its first slots.
    """
    ranks, slots = before.held.shape[1:]
    own = before.num_experts // ranks
    placed = before.held.clone()
    for layer, rows in enumerate(counts.double()):
        holders = torch.zeros(ranks, before.num_experts, dtype=torch.float64).scatter_(1, placed[layer, :, :own], 1.0)
        filled = torch.full((ranks,), own)
        mine = placed[layer, :, :own]
        placed[layer, :, own:] = mine.gather(1, rows[mine].argmin(1, keepdim=True))
        while True:
            each = holders * rows / holders.sum(0)
            load = each.sum(1)
            fullest = load.argmax()
            hottest = each[fullest].argmax()
            free = (filled < slots) & (holders[:, hottest] == 0)
            if not free.any():
                break
            to = load.masked_fill(~free, float("inf")).argmin()
            more = holders.clone()
            more[to, hottest] = 1.0
            if (more * rows / more.sum(0)).sum(1).max() >= load[fullest]:
                break
            holders = more
            placed[layer, to, filled[to]] = hottest
            filled[to] += 1
    return Placement(placed.flatten(1), ranks, before.num_experts)


def _packed(weights: Float[Tensor, "L n"], packs: int) -> Int[Tensor, "L n"]:
    """Items in the order of packs of equal size: the heaviest first, each into the lightest pack with room."""
    if weights.shape[1] == packs:
        return torch.arange(packs).expand(len(weights), -1)
    result = []
    for row, order in zip(weights, weights.sort(-1, descending=True).indices.tolist(), strict=True):
        held: list[list[int]] = [[] for _ in range(packs)]
        load = [torch.zeros(())] * packs
        for item in order:
            pack = min((p for p in range(packs) if len(held[p]) < len(order) // packs), key=load.__getitem__)
            held[pack].append(item)
            load[pack] = load[pack] + row[item]
        result.append([item for pack in held for item in pack])
    return torch.tensor(result)
