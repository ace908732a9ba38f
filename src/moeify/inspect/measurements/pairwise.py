"""Similarity of the experts of each layer: cosine of their weights, cosine and CKA of their outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moeify import losses
from moeify.inspect.measurements.layer_inputs import LayerInputs, experts_of, parameters_of, unchanged
from moeify.layers import SparseLayer


@dataclass(frozen=True)
class PairwiseSimilarity:
    """Similarity of every two experts of a layer; None where it cannot be measured, NaN of experts that do nothing.

    Attributes:
        weights: cosine of all their weights.
        outputs: cosine of their outputs for the same tokens.
        cka: linear CKA of their outputs for the same tokens (Kornblith et al., arXiv 1905.00414).
    """

    weights: Float[Tensor, "E E"] | None
    outputs: Float[Tensor, "E E"] | None
    cka: Float[Tensor, "E E"] | None


@torch.no_grad()
def pairwise_similarity(seen: Mapping[str, LayerInputs], tokens: int = 128) -> dict[str, PairwiseSimilarity]:
    """The similarity of the experts of every layer.

    Args:
        seen: inputs and decisions of the layers.
        tokens: on how many tokens the outputs are compared; every expert computes all of them.
    """
    return {name: _of(found, tokens) for name, found in seen.items()}


def _weights(layer: SparseLayer) -> Float[Tensor, "E E"] | None:
    """None where experts have no weights of their own, or weights of different sizes."""
    try:
        parts = [parameters_of(layer, expert) for expert in range(layer.num_experts)]
        vectors = torch.stack([torch.cat([p.flatten() for p in expert]) for expert in parts])
    except (ValueError, RuntimeError):
        return None
    unit = F.normalize(vectors.float(), dim=-1)
    return (unit @ unit.T).cpu()


def _of(found: LayerInputs, tokens: int) -> PairwiseSimilarity:
    weights = _weights(found.layer)
    if not found.passes:
        return PairwiseSimilarity(weights, None, None)
    x = found.tokens
    x = x[:: max(1, len(x) // tokens)][:tokens]
    try:
        outputs = experts_of(found.layer).all_outputs(x)
    except ValueError:
        return PairwiseSimilarity(weights, None, None)
    idle = torch.stack([unchanged(x, output).all() for output in outputs.unbind(1)]).cpu()
    pairs = idle.unsqueeze(0) | idle.unsqueeze(1)
    likes = (weights, losses.cosine(outputs.float()).cpu(), losses.linear_cka(outputs.float()).cpu())
    return PairwiseSimilarity(*(None if like is None else like.masked_fill(pairs, torch.nan) for like in likes))
