"""Gradients of the task loss with respect to the routers and the experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moeify.inspect.faults.finding import Unknown
from moeify.layers import SparseLayer
from moeify.modes import fixed_randomness, in_evaluation
from moeify.record import record
from moeify.routing import Assignment, Routing


@dataclass(frozen=True)
class Gradients:
    """Gradients of the loss of one batch in one layer.

    Attributes:
        router: norm of the gradient of all parameters of the router that learn; None if none of them does.
        experts: norm of the gradient of each expert, NaN for one without weights; None if their weights are not
            stacked, or do not learn.
        rows: rows that each expert computed, with a weight that is not 0.
    """

    router: float | None
    experts: Float[Tensor, "E"] | None
    rows: Int[Tensor, "E"]

    @property
    def without(self) -> Bool[Tensor, "E"] | None:
        """The experts that computed rows and got no gradient at all."""
        return None if self.experts is None else (self.rows > 0) & (self.experts == 0)


def task_gradients(
    model: nn.Module, layers: Mapping[str, SparseLayer], batch: Mapping[str, Any]
) -> dict[str, Gradients]:
    """The gradients of every layer by the model's own loss, without any balance loss; the model is left unchanged.

    Raises:
        Unknown: the model returns no loss for the batch, or one without a gradient.
    """
    routers = {name: learning(layer.router) for name, layer in layers.items()}
    experts = {name: [p for p in layer.weights.values() if p.requires_grad] for name, layer in layers.items()}
    wanted = [p for found in (routers, experts) for parameters in found.values() for p in parameters]
    with in_evaluation(model), fixed_randomness(model), without_own_balance(model), torch.enable_grad():
        with record(model) as decisions:
            loss = task_loss(model, batch)
        if not loss.requires_grad:
            raise Unknown("the loss of the model has no gradient: every parameter is frozen")
        found = torch.autograd.grad(loss, wanted, allow_unused=True) if wanted else ()
    of = {id(p): g for p, g in zip(wanted, found, strict=True) if g is not None}
    return {
        name: Gradients(
            router=_norm(of, routers[name]) if routers[name] else None,
            experts=_norms(of, experts[name], layers[name].num_experts) if experts[name] else None,
            rows=_weighted_rows(decisions[name]),
        )
        for name in layers
        if name in decisions
    }


def task_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a model returns; a language model predicts its own inputs.

    Raises:
        Unknown: it returns none.
    """
    labels = {} if "labels" in batch or "input_ids" not in batch else {"labels": batch["input_ids"]}
    try:
        output = model(**batch, **labels)
    except TypeError as error:
        raise Unknown(f"the model takes no labels: {error}") from None
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise Unknown("the model returns no loss for these batches; give them labels")
    return loss


def learning(module: nn.Module | None) -> list[nn.Parameter]:
    """The parameters of a module that learn."""
    return [] if module is None else [p for p in module.parameters() if p.requires_grad]


@contextmanager
def without_own_balance(model: nn.Module) -> Iterator[None]:
    """Context manager in which a model of transformers adds no balance loss of its own."""
    configs: dict[int, Any] = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    on = [config for config in configs.values() if getattr(config, "output_router_logits", False)]
    for config in on:
        config.output_router_logits = False
    try:
        yield
    finally:
        for config in on:
            config.output_router_logits = True


def _weighted_rows(routing: Routing) -> Int[Tensor, "E"]:
    if not isinstance(routing, Assignment):
        return routing.counts
    used = routing.weight if routing.weight.dim() == 1 else routing.weight.flatten(1).abs().sum(1)
    return routing.expert[used != 0].bincount(minlength=len(routing.counts)).cpu()


def _norm(of: Mapping[int, Tensor], parameters: list[nn.Parameter]) -> float:
    squares = [of[id(p)].float().square().sum() for p in parameters if id(p) in of]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0


def _norms(of: Mapping[int, Tensor], parameters: list[Tensor], num_experts: int) -> Float[Tensor, "E"]:
    squares = torch.zeros(num_experts)
    with_weights = min(len(p) for p in parameters)
    squares[with_weights:] = torch.nan  # experts that copy their rows come last (LongCat-Flash)
    for p in parameters:
        if id(p) in of:
            squares[:with_weights] += of[id(p)][:with_weights].float().flatten(1).square().sum(1).cpu()
    return squares.sqrt()
