"""Split a dense network into a shared expert, with the hidden units that matter to most experts, and routed experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.experts.base import Experts
from moeify.find.dense import DenseFFN
from moeify.layers import moe_layers
from moeify.registry import register
from moeify.routers import NoisyTopK, TopK
from moeify.sparsify.make import of_units
from moeify.sparsify.split.measure import Measured
from moeify.sparsify.split.residual import residual_units
from moeify.sparsify.split.weights import Importance, by_weights


@register("experts", "residual_splits")
@torch.no_grad()
def residual_splits(
    dense: nn.Module, num_experts: int, *, parts: int = 1, importance: Importance = by_weights, scale: float = 1.0
) -> Experts:
    """Experts that divide the hidden units which `shared=residual` leaves (LLaMA-MoE "inter", LLaMA-MoE v2).

    Args:
        dense: a `DenseFFN`.
        num_experts: E; E + parts must divide H.
        parts: how many parts the shared expert has, each as large as an expert.
        importance: of every unit for every expert: `by_weights`, or `measure_token_importance(...)`.
        scale: multiplies the outputs; with k = 1, E - 1 of E routed units are not computed, which training compensates.

    Raises:
        ValueError: E + parts does not divide H, or the module is no `DenseFFN`.
    """
    units = _units(dense, num_experts, parts, importance)[1]
    assert isinstance(dense, DenseFFN)
    experts = of_units(dense, units, scale)
    if experts.down[1] is not None:
        experts.down[1].zero_()  # the shared expert has it
    return experts


@register("shared", "residual")
@torch.no_grad()
def residual(
    dense: nn.Module, width: int, *, num_experts: int | None = None, parts: int = 1, importance: Importance = by_weights
) -> nn.Module:
    """The hidden units that matter to most experts, as a feed-forward network which reads every token.

    Args:
        dense: a `DenseFFN`.
        width: D.
        num_experts: E of the experts beside it, which are made by `residual_splits` with the same settings; in a
            recipe, the recipe's.
        parts: how many parts the shared expert has, each as large as an expert.
        importance: of every hidden unit for every expert.

    Raises:
        ValueError: as of `residual_splits`; no number of experts.
    """
    if num_experts is None:
        raise ValueError("shared=residual needs num_experts outside a recipe: how many experts divide the other units")
    units = _units(dense, num_experts, parts, importance)[0]
    assert isinstance(dense, DenseFFN)
    down = _linear(dense.down_weight[:, units], dense.down_bias)
    up = dense.up_weight.unflatten(0, (dense.activation.projections, -1))[:, units].flatten(0, 1)
    bias = dense.up_bias
    if bias is not None:
        bias = bias.unflatten(0, (dense.activation.projections, -1))[:, units].flatten()
    return DenseFFN([_linear(up, bias)], down, dense.activation, dense.dropout.p)


def beside(shared: Callable, num_experts: int) -> Callable:
    """The function that makes the shared module of a recipe; `residual` gets the number of experts too."""
    return partial(shared, num_experts=num_experts) if _settings(shared)[0] is residual else shared


def refuse_misfit(experts: Callable, shared: Callable) -> None:
    """Refuse routed and shared experts that were not cut from one division of the hidden units.

    Raises:
        ValueError: one without the other, or settings that differ.
    """
    made, options = _settings(experts)
    alone, of_shared = _settings(shared)
    if (made is residual_splits) != (alone is residual):
        raise ValueError("experts=residual_splits and shared=residual divide one network between them; use both")
    if made is residual_splits:
        wanted = {"parts": 1, "importance": by_weights}
        options, of_shared = wanted | options, wanted | of_shared
        if differ := [name for name in wanted if options[name] != of_shared[name]]:
            raise ValueError(
                f"experts=residual_splits and shared=residual differ in {differ[0]}: {options[differ[0]]} and "
                f"{of_shared[differ[0]]}; give both the same"
            )


@torch.no_grad()
def start_routers(model: nn.Module, measured: Measured) -> None:
    """Initialise the rows of every router with the centres of the clusters of tokens (LLaMA-MoE v2).

    Args:
        model: the sparse model.
        measured: what `measure_token_importance` returned for the dense one.

    Raises:
        ValueError: a layer of which nothing was measured, or a router without a row per expert.
    """
    for name, layer in moe_layers(model).items():
        centres = measured.centres.get(layer.name)
        router: Any = layer.router
        plain = isinstance(router, TopK) or (isinstance(router, NoisyTopK) and router.hidden_weight is None)
        if centres is None or not plain or router.weight.shape != centres.shape:
            known = ", ".join(measured.centres) or "no layer"
            raise ValueError(
                f"{name} has a {type(router).__name__}, and centres were measured for {known}; "
                "measure_token_importance with one cluster per expert, for routers with one row per expert"
            )
        router.weight.copy_(centres)


def _settings(made: Callable) -> tuple[Callable, dict[str, Any]]:
    return (made.func, dict(made.keywords)) if isinstance(made, partial) else (made, {})


def _units(
    dense: nn.Module, num_experts: int, parts: int, importance: Importance
) -> tuple[Int[Tensor, "s"], Int[Tensor, "E h"]]:
    if not isinstance(dense, DenseFFN):
        raise ValueError(f"only a feed-forward network can be split, and this is a {type(dense).__name__}; use copies")
    if parts < 1 or dense.hidden % (num_experts + parts):
        raise ValueError(
            f"{dense.hidden} hidden units cannot be split into {num_experts} experts and {parts} shared parts of one "
            "size; choose a sum of both that divides them, and at least one shared part"
        )
    if dense.down_weight.is_meta:  # there are no values to split by
        units = torch.arange(dense.hidden)
        size = parts * dense.hidden // (num_experts + parts)
        return units[:size], units[size:].view(num_experts, -1)
    return residual_units(importance(dense, num_experts), parts)


def _linear(weight: Float[Tensor, "O D"], bias: Float[Tensor, "O"] | None) -> nn.Linear:
    linear = nn.Linear(*weight.shape[::-1], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)
    return linear
