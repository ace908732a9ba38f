"""Losses of a competition: the router learns to predict it, the winners to differ (CompeteSMoE v2, 2505.13380)."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moeify.routing import Assignment


def distillation(routing: Assignment, winners: float = 0.2, *, standardize: bool = False) -> Float[Tensor, ""]:
    """MSE of softmax(z) to softmax(a), plus θ times the same on the winners only (CompeteSMoE v2, arXiv 2505.13380).

    Affinities a lie close together, so that softmax(a) hardly differs from 1 / E: between a uniform router and it the
    loss is of the order of 1e-6 for 8 experts. `standardize` gives each token's affinities variance 1 first.

    Args:
        routing: a decision; it is 0 for one that no competition made.
        winners: θ.
        standardize: compare with softmax((a - mean a) / std a).
    """
    affinity = routing.evidence.affinity
    if affinity is None or routing.logits is None or routing.choices is None:
        return routing.weight.new_zeros(())
    affinity = affinity.detach()
    if standardize:
        centred = affinity - affinity.mean(-1, keepdim=True)
        affinity = centred / centred.std(-1, correction=0, keepdim=True).clamp_min(1e-12)
    error = (routing.logits.softmax(-1) - affinity.softmax(-1)).square()
    return error.mean() + winners * error.gather(-1, routing.choices.indices).mean()


def diversity(routing: Assignment) -> Float[Tensor, ""]:
    """Mean over tokens of the K x K cosines of the winners' outputs, the diagonal taken as 0 (CompeteSMoE v2).

    The mean is over K² entries as in the authors' code, so at most 1 - 1 / K.

    Args:
        routing: a decision; it is 0 for one that keeps no expert outputs.
    """
    if routing.expert_outputs is None or routing.choices is None:
        return routing.weight.new_zeros(())
    tokens, k = routing.choices.indices.shape
    unit = F.normalize(routing.expert_outputs.float(), dim=-1)
    total = unit.new_zeros(math.prod(routing.shape), unit.shape[-1]).index_add(0, routing.source, unit)
    return (total.square().sum() - unit.square().sum()) / (tokens * k * k)
