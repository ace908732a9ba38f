"""Merge LoRA adapters into weights: of the base (one dense model), or of full experts (an ordinary mixture)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from moeify.compose.attach import adapted_linears
from moeify.experts.ffn import FFN
from moeify.experts.lora import LoRA, LoRAFFN
from moeify.find.dense import is_quantized, matrix
from moeify.layers import moe_layers
from moeify.moe import MoE
from moeify.origin import Origin
from moeify.sparsify.make import fresh


@torch.no_grad()
def merge_into_experts(model: nn.Module) -> nn.Module:
    """Merge the LoRA experts of whole networks (`lora_ffn`) into full weights of each expert, in place:

        W_j = W + s · B_j A_j

    The function stays the same up to rounding; the adapters are removed. The model can then be saved, exported and
    served as any mixture of feed-forward networks.

    Args:
        model: sparse, with one routing decision per feed-forward network.

    Raises:
        ValueError: no sparse layer, or one with other experts; adapters beside single linear layers have one routing
            decision per layer, not one per network. The model is unchanged.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no sparse layer, so that there is nothing to merge")
    merged: list[tuple[MoE, FFN]] = []
    for name, layer in layers.items():
        if not isinstance(layer.experts, LoRAFFN):
            raise ValueError(_why_not_experts(name, layer, sum(isinstance(m.experts, LoRA) for m in layers.values())))
        merged.append((layer, with_full_weights(layer.experts)))
    for layer, full in merged:
        layer.replace(experts=full)
    origin = Origin.of(model)
    if origin.recipe is not None:
        replace(origin, recipe=replace(origin.recipe, experts=fresh)).write_to(model)
    return model


@torch.no_grad()
def with_full_weights(experts: LoRAFFN) -> FFN:
    """The same experts, each with full weights of its own."""
    up, down = experts.up, experts.down
    with torch.device(up.weight.device):
        full = FFN(
            experts.num_experts, up.in_features, down.in_features, width_out=down.out_features,
            activation=experts.activation, bias=up.bias is not None or down.bias is not None,
        )  # fmt: skip
    full = full.to(up.weight.dtype).train(experts.training)
    projections = ((full.up, up, experts.up_lora), (full.down, down, experts.down_lora))
    for (weight, bias), linear, lora in projections:
        for e in range(experts.num_experts):
            weight[e] = linear.weight.float() + lora.delta(e)
        if bias is not None and linear.bias is not None:
            bias.copy_(linear.bias.expand_as(bias))
    return full


def _why_not_experts(name: str, layer: MoE, beside_linears: int) -> str:
    if isinstance(layer.experts, LoRA):
        return (
            f"{name} and {beside_linears - 1} other linear layers have adapters and a router each, so that a token "
            "may take one adapter in one layer and another in the next, which no mixture of whole networks does; "
            "merge_into_base(model, weights) makes one dense model of fixed weights, save_adapters(model, folder) "
            "writes adapters that PEFT reads"
        )
    return f"{name} has {type(layer.experts).__name__} experts, not LoRA experts of a whole network (lora_ffn)"


@torch.no_grad()
def merge_into_base(model: nn.Module, weights: Mapping[str, float]) -> nn.Module:
    """Merge adapters under fixed weights into the weights of the base, in place; the result is a dense model:

        W' = W + Σ_j w_j s_j B_j A_j

    Args:
        model: what `from_adapters` or `sparsify(..., experts=lora)` made.
        weights: w of the adapters by name; adapters without an entry have 0.

    Raises:
        ValueError: an adapter that is not there; a sparse layer that is not a linear layer with adapters beside it. The
            model is unchanged.
    """
    linears = adapted_linears(model)
    known = {name for here in linears.values() for name in here.experts.names}
    if unknown := weights.keys() - known:
        raise ValueError(f"there is no adapter {', '.join(sorted(unknown))}; there are: {', '.join(sorted(known))}")
    for module, here in linears.items():
        if is_quantized(here.dense):
            raise ValueError(
                f"the base is quantised: {module} has a weight of {here.dense.weight.dtype}, which adapters cannot be "
                "added to; load the base in 16 or 32 bits and attach the adapters there"
            )
    for module, here in linears.items():
        merged = matrix(here.dense).float()
        for e, name in enumerate(here.experts.names):
            merged = merged + weights.get(name, 0.0) * here.experts.delta(e)
        old = here.dense.get_parameter("weight")
        stored = merged.to(old.dtype) if isinstance(here.dense, nn.Linear) else merged.to(old.dtype).t().contiguous()
        here.dense.weight = nn.Parameter(stored)  # the old one may be tied, for example to an embedding
        here.dense.requires_grad_(True)
        parent, _, child = module.rpartition(".")
        setattr(model.get_submodule(parent), child, here.dense)
    Origin().write_to(model)
    return model
