"""`serve_with`: change the capacity factor, the number of experts per token or the priority after training."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from moeify.capacity import Priority
from moeify.find.causal import says_causal
from moeify.layers import moe_layers
from moeify.moe import MoE
from moeify.routers.base import Router
from moeify.routers.limited import Capacity

Model = TypeVar("Model", bound=nn.Module)


def serve_with(
    model: Model, *, capacity: float | None = None, k: int | None = None, priority: Priority | None = None
) -> Model:
    """Set capacity factor, k and priority of a model's routers, to trade quality for time after training.

    Batch prioritized routing with a low capacity in evaluation is section 4 of V-MoE (arXiv 2106.05974).

        serve_with(model, capacity=0.5, priority="batch")

    Args:
        model: a model with `moeify.MoE` layers; their routers are changed in place.
        capacity: the capacity factor in evaluation of every `Capacity`; infinity for no limit.
        k: experts per token, in training as well.
        priority: which rows a `Capacity` keeps, in training as well; `batch` prefers tokens with large top-k weights.

    Returns:
        The model.

    Raises:
        ValueError: nothing to set; a setting that no router of the model has; k outside 1..E; a capacity that is not
            positive; in a decoder a priority that depends on later tokens. Nothing is changed then.
    """
    layers = moe_layers(model)
    routers = [(layer, part) for layer in layers.values() for part in layer.router.modules()]
    limited = [router for _, router in routers if isinstance(router, Capacity)]
    choosing: list[tuple[MoE, Any]] = [
        (layer, router) for layer, router in routers if isinstance(router, Router) and router.settable_k
    ]
    if capacity is None and k is None and priority is None:
        raise ValueError("there is nothing to set; pass capacity, k or priority")
    if not limited and (capacity is not None or priority is not None):
        raise ValueError(f"no router of this {type(model).__name__} has a capacity; put Capacity around one")
    if capacity is not None and capacity <= 0:
        raise ValueError(f"a capacity of {capacity} drops every token; choose one that is positive")
    if k is not None:
        _refuse_k(model, k, [layer for layer, _ in choosing])
    if priority not in (None, "position"):
        _refuse_decoders(model, list(layers), priority)
    for router in limited:
        router.eval_factor = router.eval_factor if capacity is None else capacity
        router.keep_by(router.priority if priority is None else priority)
    if k is not None:
        for _, router in choosing:
            router.k = k
    return model


def _refuse_k(model: nn.Module, k: int, layers: list[MoE]) -> None:
    if not layers:
        raise ValueError(f"no router of this {type(model).__name__} has a number of experts per token to set")
    fewest = min(layer.experts.num_experts for layer in layers)
    if not 1 <= k <= fewest:
        raise ValueError(f"k={k} experts per token out of {fewest}; choose 1 <= k <= {fewest}")


def _refuse_decoders(model: nn.Module, layers: list[str], priority: str | None) -> None:
    for name in layers:
        around = name.split(".")[:-1]
        if any(says_causal(model.get_submodule(".".join(around[: end + 1]))) for end in range(len(around))):
            raise ValueError(
                f"{name} is in a decoder, and priority={priority!r} decides by looking at later tokens; keep "
                "priority='position'"
            )
