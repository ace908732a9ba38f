"""The clustered split: hidden units with similar input weights share an expert, by balanced k-means."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.find.dense import DenseFFN
from moeify.registry import register


@register("split", "clustered")
def clustered(dense: DenseFFN, parts: int) -> Int[Tensor, "E h"]:
    """Hidden units of similar input weights: balanced k-means on normalised rows of the up matrix (MoEfication)."""
    return balanced_clusters(dense.up_weight[: dense.hidden].float(), parts)


def balanced_clusters(rows: Float[Tensor, "H D"], parts: int) -> Int[Tensor, "E h"]:
    """The members of clusters of one size, after ten rounds of k-means on the directions of the rows."""
    points = nn.functional.normalize(rows, dim=-1)
    centres = points[torch.randperm(len(points), device=points.device)[:parts]]
    for _ in range(10):
        members = by_part(greedy(points @ centres.t(), len(points) // parts), parts)
        centres = nn.functional.normalize(points[members].mean(1), dim=-1)
    return members


def greedy(affinity: Float[Tensor, "H E"], capacity: int) -> Int[Tensor, "H"]:
    """The part of every point: the free point and the part with room of the highest affinity are matched first."""
    points, parts = affinity.shape
    room = [capacity] * parts
    part_of = [-1] * points
    for pair in affinity.flatten().argsort(descending=True, stable=True).tolist():
        point, part = divmod(pair, parts)
        if part_of[point] < 0 and room[part]:
            part_of[point] = part
            room[part] -= 1
    return torch.tensor(part_of, device=affinity.device)


def by_part(part_of: Int[Tensor, "H"], parts: int) -> Int[Tensor, "E h"]:
    """The points of every part, in order, where all parts have one size."""
    return part_of.argsort(stable=True).view(parts, -1)
