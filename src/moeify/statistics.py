"""Statistics of expert load and router entropy: each quantity defined once, for training, reports and claims.

Functions of loads, rows per expert over any number of decisions, with the experts as the last axis. A decision's
`assigned` and `counts` exclude padding, and so does all that is computed from them.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

DEAD = 0.01
"""An expert is dead if its load is below this part of the mean load."""


def load(rows: Num[Tensor, "... E"]) -> Float[Tensor, "... E"]:
    """f_j = rows_j / Σ_i rows_i, each expert's share of the rows; 0 everywhere if there are none (Switch, eq. 5)."""
    return rows / rows.sum(-1, keepdim=True).clamp_min(1)


def max_violation(rows: Num[Tensor, "... E"]) -> Float[Tensor, "..."]:
    """MaxVio = max_j rows_j / mean_j rows_j - 1; 0 is even, E - 1 one expert alone (arXiv 2408.15664, eq. 4)."""
    return load(rows).amax(-1) * rows.shape[-1] - 1


def dead(rows: Num[Tensor, "... E"], below: float = DEAD) -> Int[Tensor, "..."]:
    """The number of dead experts: those whose load is below a part of the mean load.

    Args:
        rows: rows of every expert.
        below: this part.
    """
    return (load(rows) * rows.shape[-1] < below).sum(-1)


def load_entropy(rows: Num[Tensor, "... E"]) -> Float[Tensor, "..."]:
    """-Σ_j f_j log f_j / log E of the load f: 1 is even, 0 one expert alone; 0 if there is but one expert."""
    f = load(rows)
    return -torch.special.xlogy(f, f).sum(-1) / log_experts(rows.shape[-1])


def effective_share(rows: Num[Tensor, "... E"]) -> Float[Tensor, "..."]:
    """exp(H) / E of the load's entropy H = -Σ_j f_j log f_j: the share of experts that would be busy were they even."""
    f = load(rows)
    return (-torch.special.xlogy(f, f).sum(-1)).exp() / rows.shape[-1]


def load_variation(rows: Num[Tensor, "... E"]) -> Float[Tensor, "..."]:
    """The coefficient of variation of the load, deviation over mean: 0 is even, √(E - 1) one expert alone."""
    return load(rows).std(-1, correction=0) * rows.shape[-1]


def drop_rate(assigned: Num[Tensor, "... E"], counts: Num[Tensor, "... E"]) -> Float[Tensor, "..."]:
    """The share of the assigned rows that a capacity limit dropped (Switch, section 2.2)."""
    return 1 - counts.sum(-1) / assigned.sum(-1).clamp_min(1)


def router_entropy(scores: Float[Tensor, "L E"]) -> Float[Tensor, "L"]:
    """-Σ_j p_j log p_j of each decision's normalised scores, in nats: 0 for one expert, log E for a uniform choice."""
    p = scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
    return -torch.special.xlogy(p, p).sum(-1)


def log_experts(num_experts: int) -> float:
    """log E, by which entropies are divided to lie between 0 and 1; 1 for a single expert."""
    return math.log(num_experts) if num_experts > 1 else 1.0


def information(rows: Num[Tensor, "... domains E"]) -> Float[Tensor, "..."]:
    """I(expert; domain) = Σ_dj p_dj log2(p_dj / (p_d p_j)), in bits per row; 0 if they are independent."""
    joint = rows / rows.sum((-2, -1), keepdim=True).clamp_min(1)
    independent = joint.sum(-2, keepdim=True) * joint.sum(-1, keepdim=True)
    ratio = torch.where(joint > 0, joint / independent.clamp_min(1e-30), 1.0)
    return (joint * ratio.log2()).sum((-2, -1))
