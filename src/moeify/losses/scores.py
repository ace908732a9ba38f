"""Losses on the logits and scores of the router, whichever experts are chosen: z-loss, sparsity, entropies."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moeify.losses.loads import probability
from moeify.routing import Assignment, Routing


def z(routing: Routing) -> Float[Tensor, ""]:
    """Mean over decisions of logsumexp(logits)², which keeps router logits small (ST-MoE, eq. 5).

    Raises:
        ValueError: the decision keeps no logits.
    """
    if routing.logits is None:
        raise ValueError("this router computes no logits, so it has no z-loss")
    return routing.logits.logsumexp(-1).square().mean()


def l1(routing: Assignment, k: float) -> Float[Tensor, ""]:
    """E · Σ_j c_j / (L·k) · mean_l s_lj: an L1 penalty on scores, larger for busier experts (ReMoE, eq. 10).

    Args:
        routing: a decision with scores.
        k: the target number of experts per token.

    Raises:
        ValueError: the decision keeps no scores.
    """
    if routing.scores is None:
        raise ValueError("this router keeps no scores, so they cannot be penalised")
    decisions, num_experts = routing.scores.shape
    return num_experts * (routing.assigned / (decisions * k) * routing.scores.mean(0)).sum()


def local_entropy(
    routing: Routing, of: Bool[Tensor, "L"] | None = None, *, label: int | None = None
) -> Float[Tensor, ""]:
    """Mean over decisions of H(p_l), in nats: minimising it makes every token confident (LIMoE, 2206.02770).

    Args:
        routing: a decision with scores.
        of: the decisions that count, such as those of one modality; all if not given. None marked gives 0.
        label: count those of this label, which `moeify.routers.Labelled` keeps.

    Raises:
        ValueError: the decision keeps no scores, or no labels where one is given.
    """
    p = _of(routing, of, label)
    return _entropy(p).sum() / max(1, len(p))


def global_entropy(
    routing: Routing, of: Bool[Tensor, "L"] | None = None, experts: float | None = None, *, label: int | None = None
) -> Float[Tensor, ""]:
    """max(0, log S - H(mean_l p_l)), in nats: minimising it keeps at least S experts in use (LIMoE, arXiv 2206.02770).

    Args:
        routing: a decision with scores.
        of: the decisions that count, such as those of one modality; all if not given. None marked gives 0.
        experts: S, all experts if not given.
        label: count the decisions of this label, which `moeify.routers.Labelled` keeps.

    Raises:
        ValueError: the decision keeps no scores, or no labels where one is given.
    """
    p = _of(routing, of, label)
    if len(p) == 0:
        return p.sum()
    wanted = math.log(p.shape[-1] if experts is None else experts)
    return (wanted - _entropy(p.mean(0))).clamp_min(0)


def _of(routing: Routing, of: Bool[Tensor, "L"] | None, label: int | None) -> Float[Tensor, "M E"]:
    p = probability(routing)
    if label is not None:
        if routing.evidence.label is None:
            raise ValueError("this decision has no labels; put Labelled around its router, or mark decisions by `of`")
        of = routing.evidence.label == label
    return p if of is None else p[of]


def _entropy(p: Float[Tensor, "... E"]) -> Float[Tensor, "..."]:
    return -torch.special.xlogy(p, p.clamp_min(torch.finfo(p.dtype).tiny)).sum(-1)
