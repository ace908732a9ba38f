"""SMoE-Dropout: a random router that is never trained."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, k_best, project, real_tokens
from moeify.routing import Assignment, Evidence


@register("router", "frozen")
class Frozen(Router):
    """The k experts of the largest random projections, weighted by a softmax over those k (arXiv 2303.01610).

    The projection is a buffer: saved, never trained. Training begins with a k below E and ends with k = E, by
    `moeify.train.KSchedule`; afterwards k is free to choose, and quality rises with it.

    Args:
        width: D.
        num_experts: E.
        k: experts per token; may be set at any time.

    Raises:
        ValueError: k outside 1..E.
    """

    settable_k = True
    weights_sum_to_one = True

    def __init__(self, width: int, num_experts: int, *, k: int = 2) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(f"k={k} experts per token out of {num_experts} experts; choose 1 <= k <= {num_experts}")
        self.num_experts, self.k = num_experts, k
        self.register_buffer("weight", torch.randn(num_experts, width) * width**-0.5)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token by its random projections."""
        tokens = real_tokens(x, context)
        logits = project(tokens.x, self.weight)
        best, indices = k_best(logits, self.k)
        evidence = Evidence(logits=logits, scores=logits.softmax(-1))
        return tokens.assign(indices, best.softmax(-1), self.num_experts, evidence)

    def extra_repr(self) -> str:
        """Experts per token."""
        return f"experts={self.num_experts}, k={self.k}"
