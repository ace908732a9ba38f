"""Combine several LoRA adapters into one: by weights of your own, or by weights that a search finds (LoraHub)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from moeify.experts.lora import LoRA
from moeify.layers import moe_layers
from moeify.moe import MoE
from moeify.origin import Origin
from moeify.routers.uniform import Uniform
from moeify.sparsify.lora import lora


@torch.no_grad()
def combine_lora(experts: LoRA, weights: Sequence[float] | None = None, *, separately: bool = False) -> LoRA:
    """Combine E adapters of one layer into one, called `merged`:

        together      Σ_j w_j s_j B_j A_j            exactly, with rank E · r
        separately    s (Σ_j w_j B_j) (Σ_j w_j A_j)  of rank r; what LoraHub does, a product of sums

    Args:
        experts: the adapters.
        weights: w; 1 / E if not given.
        separately: add up the factors rather than the products.

    Raises:
        ValueError: not one weight per adapter; factors of adapters of different scales.
    """
    weights = [1 / experts.num_experts] * experts.num_experts if weights is None else weights
    if len(weights) != experts.num_experts:
        raise ValueError(f"{len(weights)} weights for {experts.num_experts} adapters; give one weight per adapter")
    if separately and not torch.equal(experts.scale, experts.scale[:1].expand_as(experts.scale)):
        raise ValueError(
            f"adapters of scales {experts.scale.tolist()} cannot be combined separately, for sums of factors have one "
            "scale; combine the products, separately=False"
        )
    a, b = experts.lora_A, experts.lora_B
    w = torch.tensor([float(weight) for weight in weights], device=a.device).view(-1, 1, 1)
    if separately:
        down, up, scale = (w * a.float()).sum(0), (w * b.float()).sum(0), experts.scale[0].item()
    else:
        s = experts.scale.view(-1, 1, 1)
        down, up, scale = a.flatten(0, 1), torch.cat(list(w * s * b.float()), dim=-1), 1.0
    with torch.device(a.device):
        one = LoRA(
            1,
            experts.width,
            experts.width_out,
            rank=len(down),
            scale=scale,
            dropout=experts.dropout.p,
            names=("merged",),
        )
    one = one.to(a.dtype).train(experts.training)
    one.lora_A[0], one.lora_B[0] = down, up
    return one


def combine_adapters(
    model: nn.Module, weights: Sequence[float] | None = None, *, separately: bool = False
) -> nn.Module:
    """Combine the adapters of every sparse layer into one, which every token gets; in place, returns the model.

    The base keeps its weights; `merge_into_base` adds adapters to them.

    Args:
        model: sparse, with `LoRA` experts.
        weights: one per adapter, the same in every layer; 1 / E if not given.
        separately: see `combine_lora`.

    Raises:
        ValueError: no adapters, and as of `combine_lora`. The model is unchanged.
    """
    merged = {layer: combine_lora(experts, weights, separately=separately) for layer, experts in _adapted(model)}
    for layer, one in merged.items():
        layer.replace(experts=one, router=Uniform(one.width, 1).to(one.lora_A.device))
    recipe, adapters = (origin := Origin.of(model)).recipe, origin.adapters
    if recipe is not None:
        experts = partial(lora, rank=next(iter(merged.values())).rank)
        recipe = replace(recipe, num_experts=1, router=Uniform, experts=experts)
    if adapters is not None:
        adapters = replace(adapters, router=Uniform, names=("merged",))
    replace(origin, recipe=recipe, adapters=adapters).write_to(model)
    return model


def combine_adapters_by_search(
    model: nn.Module,
    loss: Callable[[nn.Module], float],
    *,
    budget: int = 40,
    bound: float = 1.5,
    penalty: float = 0.05,
    seed: int = 42,
) -> list[float]:
    """Find weights of the adapters without a gradient, and combine them by these (LoraHub, arXiv 2307.13269):

        minimise  loss(w) + 0.05 · mean |w|   over w in [-1.5, 1.5]^E, by Nevergrad's NGOpt from w = 0

    A and B are combined separately, with the same w in every layer.

    Args:
        model: sparse, with `LoRA` experts, the same number in every layer; ends up with one adapter.
        loss: the loss of the model on a few examples; called `budget` times.
        budget: weights that are tried.
        bound: the largest weight.
        penalty: the factor of mean |w|.
        seed: of the search.

    Returns:
        w.

    Raises:
        ImportError: nevergrad is not installed.
        ValueError: no adapters; adapters that `combine_lora` refuses; a loss that is not finite. The model is as it
            was.
    """
    try:
        import nevergrad
    except ImportError:
        raise ImportError("the search needs nevergrad; pip install 'moeify[adapters]'") from None
    before = [(layer, experts, layer.router) for layer, experts in _adapted(model)]
    sizes = sorted({experts.num_experts for _, experts, _ in before})
    if len(sizes) > 1:
        raise ValueError(f"layers have {sizes} adapters, but one weight per adapter serves all layers; adapt all alike")

    def objective(w: Any) -> float:
        for layer, experts, _ in before:
            one = combine_lora(experts, w, separately=True)
            layer.replace(experts=one, router=Uniform(one.width, 1).to(one.lora_A.device))
        with torch.no_grad():
            value = float(loss(model))
        if not math.isfinite(value):
            raise ValueError(f"the loss is {value} for the weights {[round(float(each), 3) for each in w]}")
        return value + penalty * sum(map(abs, w)) / len(w)

    space = nevergrad.p.Array(init=[0.0] * sizes[0], lower=[-bound] * sizes[0], upper=[bound] * sizes[0])
    space.random_state.seed(seed)
    try:
        found = nevergrad.optimizers.NGOpt(parametrization=space, budget=budget).minimize(objective).value
    finally:
        for layer, experts, router in before:
            layer.replace(experts=experts, router=router)
    weights = [float(each) for each in found]
    combine_adapters(model, weights, separately=True)
    return weights


def _adapted(model: nn.Module) -> list[tuple[MoE, LoRA]]:
    found = [(layer, layer.experts) for layer in moe_layers(model).values() if isinstance(layer.experts, LoRA)]
    if not found:
        raise ValueError(f"this {type(model).__name__} has no adapters to combine; make some with experts=lora")
    return found
