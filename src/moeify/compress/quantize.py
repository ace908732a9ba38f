"""Experts of a whole model with weights of 8 or 4 bits, in the places of the ones it was trained with."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from moeify.experts import Experts, quantize
from moeify.moe import MoE

Model = TypeVar("Model", bound=nn.Module)


def quantize_experts(model: Model, bits: int = 8, group_size: int = 64) -> Model:
    """Quantise all feed-forward experts of a model's sparse layers; in place, layer by layer.

    Args:
        model: a model with layers of `moeify.MoE`.
        bits: 8 or 4.
        group_size: weights that share a scale, 32 or 64; of 4 bits only.

    Raises:
        ValueError: the model has no experts that can be quantised.
    """
    found = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, Experts) and child.stacked is not None
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no feed-forward experts to quantise; make it sparse first")
    for module, name, experts in found:
        quantized = quantize(experts, bits, group_size)
        if isinstance(module, MoE):
            module.replace(experts=quantized)
        else:  # experts inside others, such as `Masked`
            setattr(module, name, quantized)
    return model
