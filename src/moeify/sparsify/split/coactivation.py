"""The co-activation split: hidden units that are active together share an expert, by a balanced graph partition.

MoEfication (arXiv 2110.01786) weighs the edge between two hidden units by how often they are active together, and lets
METIS cut the graph into equal parts. LLaMA-MoE's code weighs it by Σ |h_i h_j| where activations are never exactly 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.find.dense import DenseFFN
from moeify.find.where import Where, ffn
from moeify.modes import in_evaluation
from moeify.registry import register
from moeify.sparsify.split.clustered import balanced_clusters
from moeify.sparsify.split.measure import Batch, Measured, by_down, networks, real_tokens, require_reached, seen
from moeify.sparsify.split.weights import Importance


@torch.no_grad()
def measure_coactivation(model: nn.Module, batches: Iterable[Batch], *, where: Where = ffn) -> Measured:
    """Σ_x |h_i(x) h_j(x)| of every pair of hidden units of every network: H² numbers each.

    Args:
        model: the dense model.
        batches: of the model's arguments; `attention_mask` marks padding.
        where: selects the networks.

    Raises:
        ValueError: a network whose tokens are not those of the mask, or that is not reached.
    """
    dense = networks(model, where)
    sums = {name: torch.zeros(network.hidden, network.hidden) for name, network in dense.items()}
    for batch in batches:
        hidden: dict[str, Tensor] = {}
        with in_evaluation(model), seen(dense, {}, hidden):
            model(**batch)
        require_reached(dense, hidden)
        for name, h in hidden.items():
            active = h.flatten(0, -2)[real_tokens(name, batch, h)].float().abs()
            sums[name] = sums[name].to(h.device) + active.t() @ active
    return Measured(by_down(dense, sums))


@register("split", "coactivated")
def coactivated(dense: DenseFFN, parts: int, *, importance: Importance) -> Int[Tensor, "E h"]:
    """Hidden units that are active together: an equal partition of the graph that `measure_coactivation` measured.

    Balanced k-means on the rows of the graph, then swaps of two units as long as one reduces the weight of the cut.

    Args:
        dense: the dense network.
        parts: E.
        importance: the weights of the edges, (H, H).
    """
    graph = importance(dense, parts).clone().fill_diagonal_(0)
    return refined(graph, balanced_clusters(graph, parts))


def refined(graph: Float[Tensor, "H H"], members: Int[Tensor, "E h"], rounds: int = 10) -> Int[Tensor, "E h"]:
    """Swap two units of different parts wherever that reduces the weight of the cut (Kernighan and Lin 1970)."""
    parts = len(members)
    part_of = torch.empty(len(graph), dtype=torch.long, device=graph.device)
    part_of[members] = torch.arange(parts, device=graph.device).unsqueeze(1).expand_as(members)
    for _ in range(rounds):
        swapped = False
        ties = torch.zeros(len(graph), parts, device=graph.device).index_add(1, part_of, graph)  # (H, E)
        for i in range(len(graph)):
            own = ties.gather(1, part_of.unsqueeze(1)).squeeze(1)
            gain = ties[i, part_of] - own[i] + ties[:, part_of[i]] - own - 2 * graph[i]
            gain[part_of == part_of[i]] = 0
            j = int(gain.argmax())
            if gain[j] > 1e-5 * own.abs().max():
                p, q = int(part_of[i]), int(part_of[j])
                ties[:, p] += graph[:, j] - graph[:, i]
                ties[:, q] += graph[:, i] - graph[:, j]
                part_of[i], part_of[j] = q, p
                swapped = True
        if not swapped:
            break
    return part_of.argsort(stable=True).view(parts, -1)
