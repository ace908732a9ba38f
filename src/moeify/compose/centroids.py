"""Compute the centroids of `Similarity` routers from a few examples of what each expert was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moeify.compose.router_init import mean_inputs
from moeify.layers import moe_layers
from moeify.routers.similarity import Similarity


@torch.no_grad()
def set_centroids(model: nn.Module, examples: Sequence[Sequence[Any]]) -> None:
    """Set every `Similarity` router's centroid of an expert to the mean of what it reads over the expert's examples.

    The examples of an expert go through that expert, as its own data will.

    Args:
        model: with `Similarity` routers.
        examples: for every expert, in order, some inputs of the model: tensors, tuples of arguments or mappings.

    Raises:
        ValueError: no such router; not some examples for every expert.
    """
    layers = [layer for layer in moe_layers(model).values() if isinstance(layer.router, Similarity)]
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no Similarity router whose centroids could be set")
    num_experts = layers[0].experts.num_experts
    if len(examples) != num_experts or not all(map(len, examples)):
        raise ValueError(
            f"{num_experts} experts need {num_experts} lists of examples, none empty; got lists of "
            f"{', '.join(str(len(each)) for each in examples) or 'nothing'}"
        )
    means = [mean_inputs(model, e, layers, examples[e]) for e in range(num_experts)]
    for layer in layers:
        layer.router.get_buffer("centroids").copy_(torch.stack([of_expert[layer] for of_expert in means]))
