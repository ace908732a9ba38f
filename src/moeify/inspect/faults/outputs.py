"""The largest outputs of every expert before they are weighted, by which super-experts are recognised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeify.hf.decisions import choices, is_observed, unobserved
from moeify.inspect.faults.finding import Unknown
from moeify.inspect.faults.taps import require_taps
from moeify.layers import HfLayer, SparseLayer
from moeify.modes import fixed_randomness, in_evaluation
from moeify.routing import Assignment, Routing


@dataclass
class Outputs:
    """The outputs of a layer's experts on some batches.

    Attributes:
        peak: largest magnitude of each expert's outputs, 0 of one that computed no row.
        medians: the median magnitude of all outputs, of every batch.
    """

    peak: Float[Tensor, "E"]
    medians: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The mean over batches of the median magnitude."""
        return sum(self.medians) / len(self.medians)

    def add(self, rows: Float[Tensor, "R O"], expert: Int[Tensor, "R"]) -> None:
        """Update both statistics with the outputs of some rows."""
        if len(rows):
            sizes = rows.detach().float().abs()
            self.medians.append(float(sizes.median()))
            self.peak.scatter_reduce_(0, expert.cpu(), sizes.amax(1).cpu(), "amax")


@torch.no_grad()
def expert_outputs(
    model: nn.Module, layers: Mapping[str, SparseLayer], batches: list[Mapping[str, Any]]
) -> dict[str, Outputs]:
    """Run some batches and measure what every expert returns for its own rows.

    Raises:
        Unknown: hooks cannot access the experts of a layer.
    """
    for layer in layers.values():
        require_taps(layer)
    found = {name: Outputs(torch.zeros(layer.num_experts)) for name, layer in layers.items()}
    handles = [handle for name, layer in layers.items() for handle in _watch(layer, found[name])]
    try:
        with in_evaluation(model), fixed_randomness(model):
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: outputs for name, outputs in found.items() if outputs.medians}


def _watch(layer: SparseLayer, outputs: Outputs) -> list[RemovableHandle]:
    if not isinstance(layer, HfLayer):
        return [*_watch_ours(layer, outputs)]

    def again(experts: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        if not is_observed():
            return
        index, weights = choices((*args, *kwargs.values()))
        expert = index.reshape(-1, 1)
        token = torch.arange(len(index), device=index.device).repeat_interleave(index.shape[1])

        def by_row(value: Any) -> Any:
            if value is index:
                return expert
            if value is weights:
                return torch.ones_like(expert, dtype=weights.dtype)
            if isinstance(value, Tensor) and len(value) != len(index):
                raise Unknown(f"{type(experts).__name__} takes its tokens in another shape than its choices")
            return value[token] if isinstance(value, Tensor) else value

        try:
            with unobserved():
                rows = experts(*map(by_row, args), **{name: by_row(value) for name, value in kwargs.items()})
        except ValueError as error:  # LongCat-Flash reads at least two choices
            raise Unknown(f"{type(experts).__name__} does not run with one choice per token: {error}") from None
        outputs.add(rows, expert[:, 0])

    return [layer.experts.register_forward_hook(again, with_kwargs=True)]


def _watch_ours(layer: SparseLayer, outputs: Outputs) -> Iterator[RemovableHandle]:
    """Call the experts once more, as most backends do not call them at all."""
    latest: list[Routing] = []

    def decided(router: nn.Module, args: tuple, routing: Routing) -> None:
        latest[:] = [routing]

    def again(moe: nn.Module, args: tuple, output: Tensor) -> None:
        routing = latest.pop()
        expert = torch.repeat_interleave(torch.arange(layer.num_experts), routing.counts.cpu())
        if isinstance(routing, Assignment):
            outputs.add(layer.experts(routing.dispatch(args[0]), routing.counts), expert)

    if layer.router is not None:
        yield layer.router.register_forward_hook(decided)
        yield layer.module.register_forward_hook(again)
