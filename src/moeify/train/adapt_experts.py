"""Adapt the number of experts while training: add one for tokens that have none, remove unused ones (DynMoE)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moeify import ranks
from moeify.layers import sparse_layers
from moeify.record import observe
from moeify.routers import TopAny
from moeify.routing import Routing


class AdaptExperts(TrainerCallback):
    """Adapts the number of experts in use of every `TopAny` to the tokens (DynMoE, arXiv 2405.14297).

    Over the last `window` steps of every `every`, on all ranks, decisions in training are recorded. Then, in each
    layer, experts that no token used are removed from use; and if tokens found no expert, one that is not in use is
    added: its row is the mean direction of those tokens, its threshold 0. A layer keeps at least one expert.

    A window that a checkpoint interrupts starts over.

    Args:
        every: steps from one change to the next.
        window: steps that are recorded before it.

    Raises:
        ValueError: a window that is longer than every, or empty; when training begins, a model without a `TopAny`.
    """

    def __init__(self, every: int = 900, window: int = 300) -> None:
        if not 1 <= window <= every:
            raise ValueError(f"window={window} steps of every={every}; choose 1 <= window <= every")
        self.every, self.window = every, window
        self.used: dict[str, Tensor] = {}
        self.unserved: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the routers, and start to observe decisions."""
        model: nn.Module = kwargs["model"]
        layers = sparse_layers(model) or {}
        self.routers = {name: r for name, layer in layers.items() if isinstance(r := layer.router, TopAny)}
        if not self.routers:
            raise ValueError(f"{type(model).__name__} has no TopAny router, whose experts could be adapted")
        self.recording = False
        self.handles = observe(model, partial(self._record, model))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record from the first step of a window on."""
        self.recording = state.global_step % self.every >= self.every - self.window

    def _record(self, model: nn.Module, name: str, routing: Routing) -> None:
        if not (self.recording and model.training and torch.is_grad_enabled() and name in self.routers):
            return
        unserved = routing.evidence.unserved
        assert unserved is not None
        self.used[name] = self.used.get(name, 0) + routing.counts.detach()
        self.unserved[name] = self.unserved.get(name, 0) + unserved

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Change the experts in use after the last step of a window."""
        if state.global_step % self.every:
            return
        for name in sorted(self.used):
            adapt(self.routers[name], ranks.all_reduce(self.used[name]), ranks.all_reduce(self.unserved[name]))
        self.used.clear()
        self.unserved.clear()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop observing."""
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def adapt(router: TopAny, used: Tensor, unserved: Tensor) -> None:
    """Remove the experts that no token used, then add one for the tokens that used none, if one is left.

    Args:
        router: whose experts in use change.
        used: rows that each expert had, (E,).
        unserved: the sum of the tokens that had no expert, (D,).
    """
    kept = router.in_use * (used > 0)
    if kept.any():
        router.in_use.copy_(kept)
    free = (router.in_use == 0).nonzero().flatten()
    if len(free) and unserved.any():
        new = int(free[0])
        router.weight[new] = F.normalize(unserved, dim=-1).to(router.weight.dtype)
        router.threshold[new] = 0
        router.in_use[new] = 1
