"""Show every expert every token, and count which experts a set of data reaches by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moeify.context import Context, recomputing
from moeify.find.dense import in_evaluation
from moeify.moe import MoE
from moeify.record import choices, looking_away, native_layers, observe, stacked_experts
from moeify.routers.lookup import routed
from moeify.routing import Assignment, Routing


@contextmanager
def calibrate_all_experts(model: nn.Module) -> Iterator[None]:
    """Inside, every expert reads every real token, while every layer answers what its router decides.

    For observers that sit on experts, as those of quantisation do: an expert that calibration data is never sent to
    would be left with ranges of nothing. After each pass the experts are called once more, with the tokens that they
    were not sent, and these answers are thrown away. Layers of ours and of transformers alike; `record` shows what
    routers decide, inside as outside. Soft mixtures give every expert every token anyway.

    Raises:
        ValueError: the model has no sparse layer.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    native = [experts for _, (_, experts) in native_layers(model)]
    if not layers and not native:
        raise ValueError(f"{type(model).__name__} has no sparse layer, so it has no experts to calibrate")
    backends = [layer.backend for layer in layers]
    context = Context()
    handles = context.watch([model]) if native else []
    try:
        for layer in layers:
            layer.backend = "compose"  # others may read the weights of experts without calling them
            latest: list[Routing] = []
            handles.append(layer.router.register_forward_hook(_keep(latest)))
            handles.append(layer.register_forward_hook(_show_the_rest(latest)))
        for experts in native:
            handles.append(experts.register_forward_hook(_show_native_the_rest(context), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, backend in zip(layers, backends, strict=True):
            layer.backend = backend


def _keep(latest: list[Routing]) -> Callable[..., None]:
    def hook(router: nn.Module, args: tuple, routing: Routing) -> None:
        latest[:] = [routing]

    return hook


def _show_the_rest(latest: list[Routing]) -> Callable[..., None]:
    @torch.no_grad()
    def hook(layer: MoE, args: tuple, output: Tensor) -> None:
        routing = latest.pop()
        if recomputing() or not isinstance(routing, Assignment):
            return
        tokens = args[0].reshape(-1, args[0].shape[-1])
        read = torch.zeros(len(tokens), len(routing.counts), dtype=torch.bool, device=tokens.device)
        read[routing.source, routing.expert] = True
        expert, token = _unread(read, layer.context.real(len(tokens)))
        layer.experts(tokens[token], expert.bincount(minlength=len(routing.counts)))

    return hook


def _unread(
    read: Bool[Tensor, "all E"], positions: Int[Tensor, "T"] | None
) -> tuple[Int[Tensor, "R"], Int[Tensor, "R"]]:
    """Expert and token of every visit that was not made, sorted by expert; padding need not be read."""
    unread = ~read
    if positions is not None:
        real = torch.zeros_like(read)
        real[positions] = True
        unread &= real
    expert, token = unread.T.nonzero(as_tuple=True)
    return expert, token


def _show_native_the_rest(context: Context) -> Callable[..., None]:
    showing = False

    @torch.no_grad()
    def hook(experts: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        nonlocal showing
        if recomputing() or showing:
            return
        index, gates = choices((*args, *kwargs.values()))
        positions = context.real(len(index))
        positions = torch.arange(len(index), device=index.device) if positions is None else positions
        unread = torch.ones(len(index), stacked_experts(experts), device=index.device).scatter(1, index, 0.0)
        others = unread.argsort(dim=1, descending=True)[positions, : unread.shape[1] - index.shape[1]]  # (T, E - K)

        def rest(value: Any) -> Any:
            if value is index:
                return others
            if value is gates:
                return torch.zeros_like(others, dtype=gates.dtype)
            return value[positions] if isinstance(value, Tensor) else value

        showing = True
        try:
            with looking_away():
                experts(*map(rest, args), **{name: rest(value) for name, value in kwargs.items()})
        finally:
            showing = False

    return hook


@dataclass(frozen=True)
class ExpertTokens:
    """How many tokens each expert was given.

    Attributes:
        layers: tokens of every expert, by the name of the sparse layer.
    """

    layers: dict[str, Int[Tensor, "E"]]

    def missed(self, at_least: int = 1) -> dict[str, list[int]]:
        """The experts that were given fewer tokens, by layer; layers without any are left out."""
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


@torch.no_grad()
def tokens_per_expert(model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor]) -> ExpertTokens:
    """Count the tokens that the routers of a model send to each expert, in evaluation.

    Args:
        model: of ours, or a mixture-of-experts model of transformers.
        batches: keyword arguments of the model, columns that its routers look up included, or its only argument.

    Raises:
        ValueError: the model has no sparse layer.
    """
    layers: dict[str, Tensor] = {}

    def add(name: str, routing: Routing) -> None:
        layers[name] = layers.get(name, 0) + routing.counts.cpu()

    device = next(model.parameters()).device
    handles = observe(model, add)
    try:
        with in_evaluation(model):
            for batch in batches:
                if isinstance(batch, Tensor):
                    model(batch.to(device))
                else:
                    with routed(model, batch) as inputs:
                        model(**_moved(inputs, device))
    finally:
        for handle in handles:
            handle.remove()
    return ExpertTokens(layers)


def _moved(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
