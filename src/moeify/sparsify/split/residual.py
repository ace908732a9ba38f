"""The residual split: hidden units that matter to most experts become a shared expert, the others are divided."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeify.sparsify.split.clustered import by_part, greedy


def residual_units(importance: Float[Tensor, "E H"], shared: int) -> tuple[Int[Tensor, "s"], Int[Tensor, "E h"]]:
    """The units of the shared expert and of every routed one (LLaMA-MoE's neuron-sharing "inter", arXiv 2406.16554).

    In rounds, the h most important free units of every expert are counted; those of the most experts are shared,
    the first of them where there are too many. The rest is divided as by `independent`.

    Args:
        importance: of every hidden unit for every expert.
        shared: parts of h = H / (E + shared) units that the shared expert has.
    """
    experts, units = importance.shape
    size = units // (experts + shared)
    taken = most_named(importance, size, size * shared)
    free = torch.ones(units, dtype=torch.bool, device=importance.device).index_fill(0, taken, False).nonzero().flatten()
    return taken, free[by_part(greedy(importance[:, free].t(), size), experts)]


def most_named(importance: Float[Tensor, "E H"], size: int, wanted: int) -> Int[Tensor, "s"]:
    """The `wanted` units that are among the `size` most important ones of most experts, in rounds."""
    left = importance.float().clone()
    taken: list[int] = []
    while len(taken) < wanted:
        named = torch.zeros_like(left).scatter(-1, left.topk(size, dim=-1).indices, 1.0).sum(0)
        named[taken] = 0
        most = (named == named.max()).nonzero().flatten()[: wanted - len(taken)]
        taken += most.tolist()
        left[:, most] = float("-inf")
    return torch.tensor(taken, device=importance.device)
