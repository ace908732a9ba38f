"""A supervised loss for the router: the target expert of every image is known (Mobile V-MoE)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from moeify.routing import Routing


def supervision(routing: Routing, target: Int[Tensor, "B"] | None = None) -> Float[Tensor, ""]:
    """Mean over decisions of the cross-entropy of softmax(z) with the target expert (Mobile V-MoE, arXiv 2309.04354).

    Args:
        routing: a decision with logits.
        target: the target expert of every sequence or image, for all decisions in it; by default the labels that
            `moeify.routers.Labelled` keeps.

    Raises:
        ValueError: the decision keeps no logits, or does not hold its sequences; no target, and no labels.
    """
    if routing.logits is None or routing.sequence_id is None:
        raise ValueError("only a router that keeps its logits and the sequence of every decision can be supervised")
    wanted = routing.evidence.label if target is None else target.to(routing.logits.device)[routing.sequence_id]
    if wanted is None:
        raise ValueError("this decision has no labels to learn; put Labelled around its router, or pass a target")
    return F.cross_entropy(routing.logits, wanted)
