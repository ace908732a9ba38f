"""Training and held-out loss of the byte-level language models that claims compare."""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from moeify import losses, record
from moeify.data.blocks import Blocks
from moeify.engram import Engram
from moeify.layers import sparse_layers
from moeify.routing import Routing

BALANCE = 1e-2

Batches = Callable[[torch.Generator], Any]
Objective = Callable[[nn.Module, Any], Tensor]
"""The loss of a model on a batch."""
Balancing = Callable[[Routing], Tensor]
"""What a layer's decision adds to the loss; the mean over layers counts."""


def balanced(routing: Routing) -> Tensor:
    """The balance loss with the weight that claims have."""
    return BALANCE * losses.balance(routing)


def of_domain(data: Blocks, domain: str) -> Tensor:
    """All blocks of a domain, (blocks, length)."""
    return data.input_ids[data.domain == data.domains.index(domain)].long()


def drawn(*domains: Tensor, batch: int) -> Batches:
    """Batches with as many blocks of each domain, at random."""

    def draw(dice: torch.Generator) -> Tensor:
        share = batch // len(domains)
        return torch.cat([ids[torch.randint(len(ids), (share,), generator=dice)] for ids in domains])

    return draw


def next_token(model: nn.Module, ids: Tensor) -> Tensor:
    """The loss of a language model on token ids."""
    return model(input_ids=ids, labels=ids).loss


def train(
    model: nn.Module,
    batches: Batches,
    steps: int,
    seed: int,
    rate: float,
    *,
    objective: Objective = next_token,
    balancing: Balancing = balanced,
    clip: float = 1.0,
    prepare: Callable[[nn.Module, int], None] = lambda model, step: None,
) -> nn.Module:
    """AdamW with a short warm-up and a linear decay to nothing; returns the model, also where its loss is not finite.

    Args:
        model: learns.
        batches: of what the objective takes.
        steps: of the optimizer.
        seed: of the batches.
        rate: the highest learning rate; that of an Engram's tables, which do not decay, is five times as high, as its
            authors have it.
        objective: the loss of a batch, by default that of a language model on token ids.
        balancing: the loss of the decisions of sparse layers.
        clip: the largest norm of the gradient.
        prepare: called before a step, with its number from 0.
    """
    dice = torch.Generator().manual_seed(seed)
    learning = [p for p in model.parameters() if p.requires_grad]
    tables = [memory.table for memory in model.modules() if isinstance(memory, Engram)]
    groups = [{"params": [p for p in learning if not any(p is table for table in tables)]}]
    groups += [{"params": tables, "lr": 5 * rate, "weight_decay": 0.0}] if tables else []
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.1)
    rates = [group["lr"] for group in optimizer.param_groups]
    warm = max(0.05, 1.5 / max(steps, 2))  # more than one step, as OneCycleLR divides by their number less one
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=warm, anneal_strategy="linear")
    model.train()
    for step in range(steps):
        prepare(model, step)
        loss = _loss(model, batches(dice), objective, balancing)
        if not loss.isfinite():
            break
        loss.backward()
        nn.utils.clip_grad_norm_(learning, clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def _loss(model: nn.Module, batch: Any, objective: Objective, balancing: Balancing) -> Tensor:
    if not sparse_layers(model):
        return objective(model, batch)
    with record(model) as decisions:
        task = objective(model, batch)
    return task + torch.stack([balancing(routing) for routing in decisions.values()]).mean()


@torch.no_grad()
def held_out(model: nn.Module, ids: Tensor) -> float:
    """Nats per byte."""
    model.eval()
    return fmean(model(input_ids=part, labels=part).loss.item() for part in ids.split(32))


def average(models: list[nn.Module]) -> nn.Module:
    """A model whose parameters are the means of those of the models."""
    mean = copy.deepcopy(models[0])
    with torch.no_grad():
        for target, *values in zip(mean.parameters(), *(m.parameters() for m in models), strict=True):
            target.copy_(torch.stack(values).mean(0))
    return mean
