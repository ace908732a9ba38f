"""Rows of a table to one answer per task: embeddings, levels that all tasks read, and a tower per task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.moe import MoE
from moeify.routers.extraction import Extraction


class MultiTaskOutput(NamedTuple):
    """What `MultiTask` returns.

    Attributes:
        loss: the mean cross-entropy of all labels that are not missing, None without labels.
        logits: one per task; above 0 the answer is yes.
    """

    loss: Float[Tensor, ""] | None
    logits: Float[Tensor, "B G"]


class MultiTask(nn.Module):
    """The shared-bottom model: every task has a tower on the same features. Made sparse, it is MMoE, CGC or PLE.

    A level is two linear layers, each with a ReLU, as in DeepCTR; `moeify.tasks.multitask` has the recipes, which
    replace the levels by experts under several gates.

    Args:
        sizes: the number of categories of every column of categories.
        numbers: the number of columns of numbers.
        tasks: G.
        embedding: width of an embedding.
        hidden: H of a level.
        out: O of a level, the width that towers read.
        levels: how many.
        tower: hidden width of a tower.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        numbers: int,
        tasks: int,
        *,
        embedding: int = 8,
        hidden: int = 128,
        out: int = 32,
        levels: int = 1,
        tower: int = 16,
    ) -> None:
        super().__init__()
        self.settings = {
            "sizes": list(sizes), "numbers": numbers, "tasks": tasks, "embedding": embedding, "hidden": hidden,
            "out": out, "levels": levels, "tower": tower,
        }  # fmt: skip
        self.tasks = tasks
        self.embeddings = nn.ModuleList(nn.Embedding(size, embedding) for size in sizes)
        width = len(sizes) * embedding + numbers
        self.levels = nn.ModuleList(_level(width if i == 0 else out, hidden, out) for i in range(levels))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(out, tower), nn.ReLU(), nn.Linear(tower, 1)) for _ in range(tasks)
        )

    def forward(
        self, categories: Int[Tensor, "B C"], numbers: Float[Tensor, "B M"], labels: Float[Tensor, "B G"] | None = None
    ) -> MultiTaskOutput:
        """The logit of every task, and the loss where there are labels; a label that is NaN does not count."""
        embedded = [table(column) for table, column in zip(self.embeddings, categories.unbind(1), strict=True)]
        x = torch.cat([*embedded, numbers], dim=1)
        streams = x.unsqueeze(1).expand(-1, self.tasks + 1, -1)  # one per task, and that of the shared experts
        for level in self.levels:
            streams = self._pass(level, streams)
        logits = torch.cat([tower(streams[:, i]) for i, tower in enumerate(self.towers)], dim=1)
        return MultiTaskOutput(None if labels is None else _losses(logits, labels).nanmean(), logits)

    def _pass(self, level: nn.Module, streams: Float[Tensor, "B S D"]) -> Float[Tensor, "B S O"]:
        """The streams after a level: one for all of a dense level, one per gate of a sparse one."""
        reads_all = isinstance(level, MoE) and isinstance(level.router, Extraction)
        y = level(streams.flatten(1) if reads_all else streams[:, -1])
        return y if y.dim() == 3 else y.unsqueeze(1).expand(-1, self.tasks + 1, -1)


def _level(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out), nn.ReLU())


def _losses(logits: Float[Tensor, "B G"], labels: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    """Cross-entropies, NaN where a label is."""
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0.0), reduction="none")
    return losses.masked_fill(labels.isnan(), torch.nan)
