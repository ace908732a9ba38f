"""Networks of several tasks: features of the inputs that all share or gates mix, and a tower for each task."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moeify import MoE
from moeify.experts import Each
from moeify.routers import MultiGate


class Towers(nn.Module):
    """Features of every task, (rows, tasks, width) or the same for all, (rows, width), and a tower for each task."""

    def __init__(self, features: nn.Module, width: int, *, tasks: int = 2, hidden: int = 8) -> None:
        super().__init__()
        self.features, self.tasks = features, tasks
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1)) for _ in range(tasks)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        if features.dim() == 2:
            features = features.unsqueeze(1).expand(-1, self.tasks, -1)
        return torch.cat([tower(features[:, task]) for task, tower in enumerate(self.towers)], 1)


def layer(width: int, units: int) -> nn.Module:
    """A ReLU layer, which is an expert too."""
    return nn.Sequential(nn.Linear(width, units), nn.ReLU())


def gated(width: int, units: int, *, experts: int, private: int, tasks: int = 2) -> Towers:
    """MMoE, and CGC if tasks have private experts."""
    router = MultiGate(width, experts, gates=tasks, private=private)
    return Towers(MoE(router, Each(layer(width, units) for _ in range(experts))), units, tasks=tasks)


def trained(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    batch: int,
    seed: int,
    rate: float,
) -> nn.Module:
    """The model after so many steps of Adam on batches drawn by a seed, at a rate that falls linearly to 0."""
    dice = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch,), generator=dice)
        loss(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model
