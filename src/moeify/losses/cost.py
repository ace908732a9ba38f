"""Losses on compute: balance weighted by the cost of experts (HMoE), and a budget for sparse ones (NLLB)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from moeify.losses.loads import probability, share
from moeify.routing import Assignment


def cost(routing: Assignment, costs: Float[Tensor, "E"]) -> Float[Tensor, ""]:
    """E · Σ_j c_j · f_j · P_j with c relative to its mean: the P-Penalty of HMoE (arXiv 2408.10681).

    It is `balance` for equal costs; for others its gradient moves tokens to cheap experts. MoE++ (arXiv 2410.07348)
    weights experts without computation by τ instead of 0, so that they are balanced too:
    `cost(routing, experts.costs.clamp(min=0.75))`.

    Args:
        routing: a decision with scores.
        costs: of a row at each expert, such as `experts.costs`; not all zero.

    Raises:
        ValueError: the decision keeps no scores.
    """
    p = probability(routing)
    c = costs.to(p) / costs.to(p).mean()
    return len(c) * (c * share(routing) * p.mean(0)).sum()


def budget(routing: Assignment, share: float) -> Float[Tensor, ""]:
    """|mean G - share|: hold the mean weight G of the sparse experts at a share (NLLB, arXiv 2207.04672).

    G is what the gate of a `Conditional` router gives them. The authors' code takes the mean over all layers before the
    absolute value; this is of one layer.

    Args:
        routing: a decision of a `Conditional` router: its last expert has the weight 1 - G.
        share: p, the target of the mean G.
    """
    dense = routing.weight * (routing.expert == len(routing.counts) - 1)
    return (1 - dense.sum() / max(1, routing.tokens) - share).abs()
