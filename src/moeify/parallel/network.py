"""How long collectives take on a cluster, from the bytes that each process sends.

Latency plus bytes over bandwidth, by the algorithms for long messages (Thakur et al., IJHPCA 19(1), 2005): of n
processes each sends (n - 1) / n of the bytes in a pairwise all-to-all, an all-gather along a ring or a reduce-scatter,
and twice as much in an all-reduce, which is the last two one after the other.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.parallel.cluster import Cluster


def exchange(cluster: Cluster, sent: Float[Tensor, "..."], group: int, stride: int = 1) -> Float[Tensor, "..."]:
    """Seconds of an all-to-all in which the busiest process sends or receives this many bytes, to itself among others.

    Args:
        cluster: what it runs on.
        sent: bytes.
        group: processes that take part.
        stride: distance of two neighbours in the order of ranks.
    """
    if group == 1:
        return torch.zeros_like(sent)
    here, nodes = cluster.across(group, stride)
    seconds = sent * ((here - 1) / group / cluster.intra.bandwidth) + cluster.intra.latency
    if nodes > 1:
        seconds = seconds + sent * ((group - here) / group / cluster.inter.bandwidth) + cluster.inter.latency
    return seconds


def gather(cluster: Cluster, gathered: float, group: int, stride: int = 1) -> float:
    """Seconds of an all-gather, or of a reduce-scatter, of this many bytes in all.

    On several nodes the processes of a node share the way out, as rings of NCCL do, while the rest goes on inside.
    """
    if group == 1 or not gathered:
        return 0.0
    here, nodes = cluster.across(group, stride)
    inside = gathered * (here - 1) / here / cluster.intra.bandwidth
    outside = gathered * (nodes - 1) / nodes / (here * cluster.inter.bandwidth)
    latency = cluster.intra.latency * math.log2(max(here, 2)) + cluster.inter.latency * math.ceil(math.log2(nodes))
    return max(inside, outside) + latency


def reduce(cluster: Cluster, reduced: float, group: int, stride: int = 1) -> float:
    """Seconds of an all-reduce: a reduce-scatter and an all-gather."""
    return 2 * gather(cluster, reduced, group, stride)
