"""Adapters become weights: a mixture of full networks, or one dense model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from moeify.compose.attach import adapted
from moeify.experts.ffn import FFN
from moeify.experts.lora import LoRA, LoRAFFN
from moeify.find.dense import matrix
from moeify.layers import moe_layers
from moeify.moe import MoE
from moeify.origin import Origin
from moeify.sparsify.make import fresh


@torch.no_grad()
def bake(model: nn.Module) -> nn.Module:
    """Turn networks with low-rank changes (`lora_ffn`) into ordinary experts of full weights, in place:

        W_j = W + s · B_j A_j

    What it computes stays, but for rounding; the low-rank maps are gone. It can then be saved, exported and served as
    any mixture of feed-forward networks.

    Args:
        model: sparse, with one decision per feed-forward network.

    Raises:
        ValueError: no sparse layer, or one with other experts; adapters beside single maps decide in every map for
            themselves, which no mixture of whole networks does. The model is as it was.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no sparse layer, so that there is nothing to bake")
    banks: list[tuple[MoE, FFN]] = []
    for name, layer in layers.items():
        if not isinstance(layer.experts, LoRAFFN):
            raise ValueError(_cannot_be_baked(name, layer, sum(isinstance(m.experts, LoRA) for m in layers.values())))
        banks.append((layer, _full(layer.experts)))
    for layer, full in banks:
        layer.replace(experts=full)
    origin = Origin.of(model)
    if origin.recipe is not None:
        replace(origin, recipe=replace(origin.recipe, experts=fresh)).write_to(model)
    return model


def _full(experts: LoRAFFN) -> FFN:
    up, down = experts.up, experts.down
    with torch.device(up.weight.device):
        full = FFN(
            experts.num_experts, up.in_features, down.in_features, width_out=down.out_features,
            activation=experts.activation, bias=up.bias is not None or down.bias is not None,
        )  # fmt: skip
    full = full.to(up.weight.dtype).train(experts.training)
    maps = ((full.up, up, experts.up_lora), (full.down, down, experts.down_lora))
    for (weight, bias), linear, lora in maps:
        for e in range(experts.num_experts):
            weight[e] = linear.weight.float() + lora.delta(e)
        if bias is not None and linear.bias is not None:
            bias.copy_(linear.bias.expand_as(bias))
    return full


def _cannot_be_baked(name: str, layer: MoE, beside_maps: int) -> str:
    if isinstance(layer.experts, LoRA):
        return (
            f"{name} and {beside_maps - 1} other maps have adapters beside them and decide for themselves, so that a "
            "token may take one adapter in one map and another in the next, which no mixture of whole networks does; "
            "merge_into_dense(model, weights) makes one dense model of fixed weights, save_adapters(model, folder) "
            "writes adapters that PEFT reads"
        )
    return f"{name} has {type(layer.experts).__name__} experts, which are no low-rank changes of a network (lora_ffn)"


@torch.no_grad()
def merge_into_dense(model: nn.Module, weights: Mapping[str, float]) -> nn.Module:
    """Turn a pool of adapters into the dense model that it is under fixed weights, in place:

        W' = W + Σ_j w_j s_j B_j A_j

    Args:
        model: what `from_adapters` or `sparsify(..., experts=lora)` made.
        weights: w of the adapters by name; those that are left out have 0.

    Raises:
        ValueError: an adapter that is not there; a sparse layer that is no linear map with adapters beside it. The
            model is as it was.
    """
    maps = adapted(model)
    known = {name for here in maps.values() for name in here.experts.names}
    if unknown := weights.keys() - known:
        raise ValueError(f"there is no adapter {', '.join(sorted(unknown))}; there are: {', '.join(sorted(known))}")
    for module, here in maps.items():
        merged = matrix(here.dense).float()
        for e, name in enumerate(here.experts.names):
            merged = merged + weights.get(name, 0.0) * here.experts.delta(e)
        old = here.dense.get_parameter("weight")
        stored = merged.to(old.dtype) if isinstance(here.dense, nn.Linear) else merged.to(old.dtype).t().contiguous()
        here.dense.weight = nn.Parameter(stored)  # the old one may be tied, to an embedding say
        here.dense.requires_grad_(True)
        parent, _, child = module.rpartition(".")
        setattr(model.get_submodule(parent), child, here.dense)
    Origin().write_to(model)
    return model
