"""A `Rebalancer` at work: it sees the rows of every step of a training, and experts move between two steps."""

from __future__ import annotations

import torch
from torch import nn

from moeify import ranks
from moeify.parallel.moving import divided, move_experts, require_fitting
from moeify.parallel.place import Placement
from moeify.parallel.rebalance import Move, Rebalancer
from moeify.record import observe
from moeify.routing import Routing


class Rebalancing:
    """Moves the experts of a model while it trains, where a rebalancer finds that it pays.

        running = Rebalancing(model, optimizer, Rebalancer(placed, steps=10_000))
        for batch in batches:
            model(batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            running.step()
        running.end()

    Losses, gradients and weights stay those of a training without it, up to rounding; `save_sharded` writes experts in
    their order, and a training that is resumed begins with them so.

    Args:
        model: divided by `shard` or `distribute`, the same in every process.
        optimizer: of the model.
        rebalancer: for as many layers, experts and processes as the model has, and without `spare`; with `shadows`, hot
            experts are computed by several processes.

    Attributes:
        moves: those that were made, by the number of steps before them.

    Raises:
        ValueError: as of `move_experts`, and a rebalancer with `spare`.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, rebalancer: Rebalancer) -> None:
        self.model, self.optimizer, self.rebalancer = model, optimizer, rebalancer
        if rebalancer.spare:
            raise ValueError(
                f"spare={rebalancer.spare} is for replicas with an optimizer state each, which `simulate` prices and a "
                f"training does not have; make the Rebalancer with shadows={rebalancer.spare}"
            )
        layers = divided(model)
        require_fitting(layers, rebalancer.placement)
        self.moves: dict[int, Move] = {}
        self._steps = 0
        self._place = {layer.name: at for at, layer in enumerate(layers)}
        device = next(iter(layers[0].stacks.values())).device
        self._counts = torch.zeros(len(layers), rebalancer.placement.num_experts, dtype=torch.long, device=device)
        self._handles = observe(model, self._count)

    def _count(self, name: str, routing: Routing) -> None:
        if self.model.training and name in self._place:
            self._counts[self._place[name]] += routing.counts.to(self._counts.device)

    def step(self) -> Move | None:
        """Once all processes have updated their weights: the move that was made, or None."""
        counts = ranks.all_reduce(self._counts.clone())
        self._counts.zero_()
        self._steps += 1
        move = self.rebalancer.observe(counts.cpu())
        if move is not None:
            move_experts(self.model, move.placement, self.optimizer)
            self.moves[self._steps] = move
        return move

    def end(self) -> None:
        """Move all experts back to their order, and watch no longer; all processes call it together."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        of = self.rebalancer.placement
        home = Placement.contiguous(len(of.experts), of.num_experts, of.ranks)
        move_experts(self.model, home, self.optimizer)
