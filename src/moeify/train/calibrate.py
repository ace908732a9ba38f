"""Run every expert on every token, for calibration, and count the tokens that data routes to each expert."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moeify.layers import moe_layers, sparse_layers, watch_inputs
from moeify.modes import in_evaluation
from moeify.record import Observer, observe
from moeify.routers.lookup import split_router_inputs
from moeify.routing import Routing


@contextmanager
def calibrate_all_experts(model: nn.Module) -> Iterator[None]:
    """Context manager in which every expert reads every real token; layer outputs still follow the router.

    For hooks on experts, such as those of quantisation: an expert that gets no calibration tokens
    would have no activation ranges. After each pass the experts are called once more, with the tokens that they
    were not sent, and these outputs are discarded. It works on layers of moeify and of
    transformers; `record` returns the decisions of the routers, inside as outside.
    Soft mixtures give every expert every token anyway.

    Raises:
        ValueError: the model has no sparse layer.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no sparse layer, so it has no experts to calibrate")
    backends = {moe: moe.backend for moe in moe_layers(model).values()}
    handles = watch_inputs(model, layers)
    try:
        for moe in backends:
            moe.backend = "compose"  # others may read the weights of experts without calling them
        for layer in layers.values():
            handles += layer.run_unrouted()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for moe, backend in backends.items():
            moe.backend = backend


@dataclass(frozen=True)
class ExpertTokens:
    """How many tokens each expert received.

    Attributes:
        layers: tokens of every expert, by the name of the sparse layer.
    """

    layers: dict[str, Int[Tensor, "E"]]

    def missed(self, at_least: int = 1) -> dict[str, list[int]]:
        """The experts that received fewer tokens, by layer; layers without any are omitted."""
        few = {name: (tokens < at_least).nonzero().flatten().tolist() for name, tokens in self.layers.items()}
        return {name: experts for name, experts in few.items() if experts}

    def show(self, console: Console | None = None) -> None:
        """Print a table with a line per layer."""
        table = Table(
            "layer", "fewest", "median", "most", "without any", title="tokens per expert", title_justify="left"
        )
        for name, tokens in self.layers.items():
            numbers = (int(tokens.min()), int(tokens.median()), int(tokens.max()), int((tokens == 0).sum()))
            table.add_row(name or "(model)", *(f"{number:,}" for number in numbers))
        (Console() if console is None else console).print(table)


def tokens_per_expert(model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor]) -> ExpertTokens:
    """Count the tokens that the routers of a model send to each expert, in evaluation.

    Args:
        model: a sparse model of moeify, or a mixture-of-experts model of transformers.
        batches: keyword arguments of the model, columns that its routers look up included, or its only argument.

    Raises:
        ValueError: the model has no sparse layer.
    """
    layers: dict[str, Tensor] = {}

    def add(name: str, routing: Routing) -> None:
        layers[name] = layers.get(name, 0) + routing.counts.cpu()

    route(model, batches, add)
    return ExpertTokens(layers)


@torch.no_grad()
def route(model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor], observer: Observer) -> None:
    """Run a model on batches in evaluation, and call `observer` with the name of every sparse layer and its decision.

    Args:
        model: a sparse model of moeify, or a mixture-of-experts model of transformers.
        batches: keyword arguments of the model, columns that its routers look up included, or its only argument.
        observer: what is called.

    Raises:
        ValueError: the model has no sparse layer.
    """
    device = next(model.parameters()).device
    handles = observe(model, observer)
    try:
        with in_evaluation(model):
            for batch in batches:
                if isinstance(batch, Tensor):
                    model(batch.to(device))
                else:
                    with split_router_inputs(model, batch) as inputs:
                        model(**_moved(inputs, device))
    finally:
        for handle in handles:
            handle.remove()


def _moved(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
