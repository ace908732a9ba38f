"""Record the inputs of each sparse layer and its decisions on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moeify.experts import Each, Experts
from moeify.experts.wrapped import as_experts
from moeify.hf.blocks import InterfaceBlock, unwrapped
from moeify.hf.decisions import unobserved
from moeify.hf.interface import HfExperts
from moeify.layers import HfLayer, MoELayer, SparseLayer, sparse_layers, watch_inputs
from moeify.modes import in_evaluation
from moeify.routing import Assignment, Routing


@dataclass(frozen=True)
class LayerInputs:
    """The inputs and decisions of one layer in some forward passes.

    Attributes:
        layer: the layer.
        passes: inputs of the experts, padding included, and the decision on them.
    """

    layer: SparseLayer
    passes: list[tuple[Float[Tensor, "all D"], Assignment]]

    @property
    def tokens(self) -> Float[Tensor, "T D"]:
        """The inputs of all passes that were routed to an expert."""
        return torch.cat([x[routing.source.unique()] for x, routing in self.passes])


def run(model: nn.Module, batch: Any) -> Any:
    """The output of a model for a batch: inputs by name, a tensor, or a tuple of arguments."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{name: moved(value) for name, value in batch.items() if name != "domain"})
    return model(*map(moved, batch)) if isinstance(batch, tuple | list) else model(moved(batch))


@torch.no_grad()
def layer_inputs(model: nn.Module, batches: Iterable[Any], tokens: int = 4096) -> dict[str, LayerInputs]:
    """Inputs and decisions of every layer that sends tokens to experts, up to a number of tokens."""
    layers = sparse_layers(model)
    seen = {name: LayerInputs(layer, []) for name, layer in layers.items()}
    latest: dict[str, Tensor] = {}
    count = dict.fromkeys(layers, 0)

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            found = next((value for value in (*args, *kwargs.values()) if _is_input(value)), None)
            if found is not None:
                latest[name] = found.detach().reshape(-1, found.shape[-1])

        return hook

    def observe(name: str) -> Any:
        def see(routing: Routing) -> None:
            x = latest.pop(name, None)
            if x is not None and isinstance(routing, Assignment) and len(x) == torch.Size(routing.shape).numel():
                seen[name].passes.append((x, routing.detached()))
                count[name] += len(x)

        return see

    handles = watch_inputs(model, layers)
    for name, layer in layers.items():
        called = layer.module if isinstance(layer, MoELayer) else layer.experts
        handles.append(called.register_forward_pre_hook(keep(name), with_kwargs=True))
        handles += layer.observe(observe(name))
    try:
        with in_evaluation(model):
            for batch in batches:
                run(model, batch)
                if all(n >= tokens for n in count.values()):
                    break
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _is_input(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2


def unchanged(rows: Float[Tensor, "R D"], outputs: Float[Tensor, "R O"]) -> Bool[Tensor, "R"]:
    """Which rows their expert returned as they were: it computes nothing, as LongCat-Flash's zero experts."""
    return (outputs == rows).all(-1) if outputs.shape == rows.shape else rows.new_zeros(len(rows), dtype=torch.bool)


def one_by_one(layer: SparseLayer) -> list[nn.Module] | None:
    """The experts of a layer that has a module for each, None of one that stacks their weights."""
    experts: Any = unwrapped(layer.experts)
    modules = experts.experts if isinstance(experts, Each) else experts
    if not isinstance(modules, nn.ModuleList | nn.ModuleDict):
        return None
    found = [module for module in modules.children() if next(module.parameters(), None) is not None]
    return found if len(found) == layer.num_experts else None


def parameters_of(layer: SparseLayer, expert: int) -> list[Tensor]:
    """The weights of one expert, as parts of those of all, without their biases where these are stacked as vectors.

    Raises:
        ValueError: the weights of the experts cannot be separated.
    """
    if (modules := one_by_one(layer)) is not None:
        return [p.data for p in modules[expert].parameters()]
    experts, count = unwrapped(layer.experts), layer.num_experts
    stacked = [p.data for p in experts.parameters() if p.dim() >= 2]
    parts = [p[expert] for p in stacked if len(p) == count]
    if not parts:  # DBRX: the matrices of all experts one below the other
        parts = [p.view(count, -1, *p.shape[1:])[expert] for p in stacked if len(p) % count == 0]
    if not parts:
        raise ValueError(f"the experts of {layer.name} ({type(experts).__name__}) do not hold their weights one by one")
    return parts


def experts_of(layer: SparseLayer) -> Experts:
    """The experts of a layer, moeify's or those of transformers, called with rows sorted by expert.

    Raises:
        ValueError: experts of transformers that cannot be called so.
    """
    if isinstance(layer, HfLayer):
        if (modules := one_by_one(layer)) is not None:
            return Each(modules)
        inside = unwrapped(layer.experts)
        needed = ("_apply_gate", "is_transposed", "has_bias", "has_gate")
        if inside is layer.experts and all(hasattr(inside, name) for name in needed):
            return HfExperts(inside)
        if type(layer.block) is InterfaceBlock:
            return _ByIndex(layer.experts, layer.num_experts)
        raise ValueError(f"the experts of {layer.name} ({type(inside).__name__}) cannot be called one by one")
    return as_experts(layer.experts)


class _ByIndex(Experts):
    """Experts of transformers that are called with tokens, indices and weights: a row is a token with one choice.

    The choice is passed twice, the second time with a weight of 0, because LongCat-Flash reads at least two.
    """

    def __init__(self, experts: nn.Module, num_experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.num_experts = num_experts

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """The output of every row's expert."""
        expert = torch.arange(self.num_experts, device=rows.device).repeat_interleave(counts.to(rows.device))
        weights = rows.new_tensor([1.0, 0.0]).expand(len(rows), 2)
        with unobserved():
            return self.experts(rows, expert.unsqueeze(1).expand(-1, 2), weights).reshape(len(rows), -1)
