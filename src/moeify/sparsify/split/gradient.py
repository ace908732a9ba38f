"""Splits by the importance that hidden units have for clusters of data, one cluster per expert (LLaMA-MoE)."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from moeify.find.dense import DenseFFN
from moeify.registry import register
from moeify.sparsify.split.clustered import by_part, greedy
from moeify.sparsify.split.weights import Importance, by_weights


@register("split", "independent")
def independent(dense: DenseFFN, parts: int, *, importance: Importance = by_weights) -> Int[Tensor, "E h"]:
    """A partition: the highest importance of a free unit for an expert with room decides next (LLaMA-MoE's code).

    Args:
        dense: the dense network.
        parts: E.
        importance: of every hidden unit for every expert, such as `measure_importance` returns.
    """
    return by_part(greedy(importance(dense, parts).t(), dense.hidden // parts), parts)


@register("split", "inner")
def inner(dense: DenseFFN, parts: int, *, importance: Importance = by_weights) -> Int[Tensor, "E h"]:
    """Neuron-sharing, inner: every expert gets its H / E most important units (LLaMA-MoE, arXiv 2406.16554).

    Units may be in several experts or in none, so that the experts do not add up to the dense network.

    Args:
        dense: the dense network.
        parts: E.
        importance: of every hidden unit for every expert, such as `measure_importance` returns.
    """
    return importance(dense, parts).topk(dense.hidden // parts, dim=-1).indices
