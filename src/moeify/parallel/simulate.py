"""Replay routing on described devices: how long every step would take, with experts where they are or moved."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Num
from torch import Tensor

from moeify.parallel.cost import OF_SPARSE, Step
from moeify.parallel.layout import Layout
from moeify.parallel.place import Placement
from moeify.parallel.rebalance import Move, Placed, Rebalancer
from moeify.parallel.workload import Workload
from moeify.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A replay.

    Attributes:
        static: seconds of every step with experts in their order.
        seconds: of every step with experts where they were moved to, the moves included.
        load: rows of the fullest process in units of the mean, by step, as placed.
        moves: by the step after which they were made.
    """

    static: Float[Tensor, "S"]
    seconds: Float[Tensor, "S"]
    load: Float[Tensor, "S"]
    moves: dict[int, Move]

    @property
    def speedup(self) -> float:
        """Time of all steps without moves, over the time with them."""
        return float(self.static.sum() / self.seconds.sum())

    def __str__(self) -> str:
        sent = sum(move.bytes for move in self.moves.values())
        quantiles = [1000 * float(self.seconds.quantile(q)) for q in (0.5, 0.95)]
        return (
            f"{len(self.seconds):,} steps in {float(self.seconds.sum()):,.1f} s, p50 {quantiles[0]:,.1f} ms, "
            f"p95 {quantiles[1]:,.1f} ms; {len(self.moves)} moves of {sent / 1e9:,.2f} GB in all, "
            f"{self.speedup:.3f} times as fast as without them"
        )


def simulate(
    step: Step, layout: Layout, counts: Num[Tensor, "S L E"], rebalancer: Rebalancer | None = None
) -> Simulation:
    """Replay the counts of S steps on all devices of a layout.

    Every group of `ep` processes is taken to see the same shares. A progress line is printed every ten seconds.

    Args:
        step: the model, the cluster and the program; its workload is not used.
        layout: of any number of devices.
        counts: rows of every expert in every step; their sum does not matter. One layer stands for all.
        rebalancer: moves experts; None leaves them.

    Raises:
        ValueError: another number of experts or layers than the model's.
    """
    layers = step.shape.sparse_layers
    if counts.shape[1] not in (1, layers) or counts.shape[2] != step.shape.num_experts:
        raise ValueError(
            f"counts have {counts.shape[1]} layers of {counts.shape[2]} experts, {step.shape.name} has {layers} of "
            f"{step.shape.num_experts}"
        )
    shares = Workload.counted(counts).shares.expand(-1, layers, -1)
    calm = replace(step, workload=Workload.balanced(step.shape.num_experts)).price(layout)
    rest = sum(seconds for kind, seconds in calm.seconds.items() if kind not in OF_SPARSE)
    placed = Placed(step, layout, shadows=rebalancer is not None and rebalancer.placed.shadows)
    still = Placement.contiguous(layers, step.shape.num_experts, layout.ep)
    placement, progress = still, Progress("replay", len(shares))
    static, seconds, load, moves = [], [], [], {}
    for at, now in enumerate(shares):
        static.append(rest + float(placed.seconds(still, now[None]).sum()) / layout.pp)
        moved = placement is not still
        seconds.append(rest + float(placed.seconds(placement, now[None]).sum()) / layout.pp if moved else static[-1])
        load.append(float(placement.load(now).mean()))
        if rebalancer is not None and (move := rebalancer.observe(now)) is not None:
            moves[at], placement = move, move.placement
            seconds[-1] += move.seconds
        progress.at(at + 1)
    static, seconds, load = (torch.tensor(values, dtype=torch.float64) for values in (static, seconds, load))
    return Simulation(static=static, seconds=seconds, load=load, moves=moves)
