"""Load-balancing losses: balance (Switch), group balance (DeepSeek), importance and load (Shazeer et al.)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from moeify.routing import Assignment, Routing
from moeify.statistics import load

Scope = Literal["batch", "sequence"]


def share(routing: Assignment) -> Float[Tensor, "E"]:
    """f_j: the share of all rows that are assigned to each expert, before any capacity limit; sums to 1."""
    return load(routing.assigned)


def probability(routing: Routing) -> Float[Tensor, "L E"]:
    """P_lj: each decision's scores, normalised to sum to 1 (softmax does, sigmoid does not); all zeros stay zeros.

    Raises:
        ValueError: the decision keeps no scores.
    """
    if routing.scores is None:
        raise ValueError("this router keeps no scores, so there is nothing to balance by a loss; try a controller")
    return routing.scores / routing.scores.sum(-1, keepdim=True).clamp_min(1e-20)


def balance(routing: Assignment, scope: Scope = "batch", assigned: Num[Tensor, "E"] | None = None) -> Float[Tensor, ""]:
    """E · Σ_j f_j · P_j, which is 1.0 for perfect balance for any k (Switch, eqs. 4-6).

    The gradient flows through P only.

    Args:
        routing: a decision with scores.
        scope: over what f and P are taken: the `batch` at hand, or each `sequence` by itself, averaged over their
            tokens; DeepSeek-V3's is `sequence_balance`.
        assigned: the load of each expert over a wider scope than this batch, such as all micro-batches and ranks
            of a step (global-batch balance, arXiv 2501.11873); only with scope `batch`.

    Raises:
        ValueError: no scores, or scope `sequence` for a router that does not decide token by token.
    """
    p = probability(routing)
    num_experts = p.shape[-1]
    if scope == "batch":
        f = share(routing) if assigned is None else load(assigned)
        return num_experts * (f * p.mean(0)).sum()
    if routing.choices is None or routing.sequence_id is None or routing.tokens != len(p):
        raise ValueError("balance by sequence needs a decision of its own for every token, with k experts each")
    return _by_sequence(p, routing.choices.indices, routing.sequence_id)


def sequence_balance(routing: Assignment) -> Float[Tensor, ""]:
    """The balance of every sequence, averaged over tokens, by the experts of the largest scores (DeepSeek-V3).

    f counts how often an expert is among a token's K largest scores, whatever selection bias or expert groups then
    chose (arXiv 2412.19437, eqs. 17-20): the loss acts on the scores, even where the bias has balanced the loads.
    `balance(routing, "sequence")` counts what was chosen. 1.0 is perfect. The gradient flows through P only.

    Raises:
        ValueError: no scores, or a router that does not decide token by token.
    """
    p = probability(routing)
    if routing.choices is None or routing.sequence_id is None or routing.tokens != len(p):
        raise ValueError("balance by sequence needs a decision of its own for every token, with k experts each")
    return _by_sequence(p, p.topk(routing.choices.k, dim=-1).indices, routing.sequence_id)


def _by_sequence(
    p: Float[Tensor, "T E"], chosen: Int[Tensor, "T K"], sequence_id: Int[Tensor, "T"]
) -> Float[Tensor, ""]:
    num_experts = p.shape[-1]
    rows = torch.zeros_like(p).scatter(1, chosen, 1.0)
    sequence = sequence_id.unique(return_inverse=True)[1]
    by_sequence = rows.new_zeros(int(sequence.max()) + 1, num_experts).index_add(0, sequence, rows)
    f = by_sequence / by_sequence.sum(-1, keepdim=True)
    return num_experts * (f[sequence] * p).sum(-1).mean()


def group_balance(routing: Assignment, groups: int) -> Float[Tensor, ""]:
    """`balance` of groups of neighbouring experts, such as those of one device (DeepSeek-V2, arXiv 2405.04434).

    Σ_i f'_i P'_i over groups, with f'_i the mean of E f_j and P'_i the sum of P_j over the experts of a group (eqs.
    26-28, there for every sequence, here over the batch). 1.0 is perfect. The gradient flows through P only.

    Args:
        routing: a decision with scores.
        groups: number of groups, of equal size.

    Raises:
        ValueError: no scores, or experts that cannot be divided into that many groups.
    """
    p = probability(routing)
    if groups < 1 or p.shape[-1] % groups:
        raise ValueError(f"{p.shape[-1]} experts cannot be divided into {groups} groups of equal size")
    f = share(routing).view(groups, -1).sum(-1)
    return groups * (f * p.mean(0).view(groups, -1).sum(-1)).sum()


def importance(routing: Assignment) -> Float[Tensor, ""]:
    """CV² of the summed weights of each expert; 0 for perfect balance (Shazeer et al. 2017, eq. 7)."""
    weight = routing.weight.float().flatten(1).sum(-1) if routing.has_gate_axis else routing.weight.float()
    return cv_squared(weight.new_zeros(len(routing.counts)).index_add(0, routing.expert, weight))


def score_importance(routing: Routing) -> Float[Tensor, ""]:
    """CV² of the summed softmax of the logits, before any noise and of every expert, chosen or not (V-MoE, A.2).

    `importance` is of the weights of chosen experts only, as Shazeer et al. define it; V-MoE's authors sum all scores.

    Raises:
        ValueError: the decision keeps no logits.
    """
    if routing.logits is None:
        raise ValueError("this router keeps no logits, so no expert has a score to be summed; use importance")
    return cv_squared(routing.logits.softmax(-1).sum(0))


def load_loss(routing: Assignment) -> Float[Tensor, ""]:
    """CV² of the rows that each expert can expect; 0 for perfect balance (Shazeer et al. 2017, eq. 11).

    Noisy routers compute the expected rows, with a gradient, in Shazeer's way or V-MoE's (`NoisyTopK`'s
    `expected_load`); for all others they are the assigned rows, without one.
    """
    expected = routing.evidence.expected_load
    return cv_squared(routing.assigned.float() if expected is None else expected)


def cv_squared(v: Float[Tensor, "E"]) -> Float[Tensor, ""]:
    """Variance over squared mean."""
    return v.var(correction=0) / (v.mean() ** 2 + 1e-10)
