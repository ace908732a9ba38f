"""A variable number of experts per token: top-p, a threshold, or ReLU gates."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, project, real_tokens
from moeify.routing import Assignment, Evidence


@register("router", "top_p")
class TopP(Router):
    """The likeliest experts until their probabilities exceed p, the crossing one included (Dynamic-MoE, 2403.07652).

    Weights are the probabilities, not renormalised.

    Args:
        width: D.
        num_experts: E.
        p: probability to reach.
        max_k: the most experts of a token, E if not given.
        init_std: standard deviation of the projection's initialisation.

    Raises:
        ValueError: p outside (0, 1], or max_k outside 1..E.
    """

    def __init__(
        self, width: int, num_experts: int, *, p: float = 0.4, max_k: int | None = None, init_std: float = 0.02
    ) -> None:
        super().__init__()
        if not 0 < p <= 1:
            raise ValueError(f"p={p} is not a probability; choose 0 < p <= 1")
        max_k = num_experts if max_k is None else max_k
        if not 1 <= max_k <= num_experts:
            raise ValueError(f"max_k={max_k} experts out of {num_experts}; choose 1 <= max_k <= {num_experts}")
        self.num_experts, self.p, self.max_k = num_experts, p, max_k
        self.weight = nn.Parameter(torch.randn(num_experts, width) * init_std)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token to between 1 and `max_k` experts."""
        tokens = real_tokens(x, context)
        logits = project(tokens.x, self.weight)
        scores = logits.softmax(-1)
        chosen = nucleus(scores.detach(), self.p, self.max_k)
        return tokens.assign_where(chosen, scores, Evidence(logits=logits, scores=scores))

    def rows_per_token(self, tokens: int | None = None) -> float:
        """`max_k`, the most there can be."""
        return self.max_k


def nucleus(probability: Float[Tensor, "T E"], p: float, max_k: int) -> Bool[Tensor, "T E"]:
    """The likeliest experts whose predecessors do not exceed p together: at least one, at most `max_k`."""
    ordered, experts = probability.sort(dim=-1, descending=True, stable=True)
    before = F.pad(ordered.cumsum(-1)[:, :-1], (1, 0))  # the first has no predecessors
    inside = (before <= p) & (torch.arange(probability.shape[-1], device=probability.device) < max_k)
    return torch.zeros_like(inside).scatter(-1, experts, inside)


@register("router", "threshold")
class Threshold(Router):
    """Every expert whose score exceeds a threshold, and the best one in any case.

    Args:
        width: D.
        num_experts: E.
        threshold: what a sigmoid score has to exceed.
        init_std: standard deviation of the projection's initialisation.

    Raises:
        ValueError: a threshold outside [0, 1).
    """

    def __init__(self, width: int, num_experts: int, *, threshold: float = 0.5, init_std: float = 0.02) -> None:
        super().__init__()
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold={threshold} does not separate sigmoid scores; choose 0 <= threshold < 1")
        self.num_experts, self.threshold = num_experts, threshold
        self.weight = nn.Parameter(torch.randn(num_experts, width) * init_std)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token to the experts above the threshold."""
        tokens = real_tokens(x, context)
        logits = project(tokens.x, self.weight)
        scores = logits.sigmoid()
        chosen = (scores > self.threshold).scatter(-1, scores.argmax(-1, keepdim=True), True)
        return tokens.assign_where(chosen, scores, Evidence(logits=logits, scores=scores))


@register("router", "relu")
class ReLU(Router):
    """ReMoE: g = relu(x W); an expert runs where its gate is positive (arXiv 2412.14711, eq. 5).

    Differentiable everywhere; how many experts run is controlled by `moeify.losses.l1`, whose weight
    `moeify.balance.SparsityTarget` adapts.

    Args:
        width: D.
        num_experts: E.
        init_std: standard deviation of the projection's initialisation.
    """

    def __init__(self, width: int, num_experts: int, *, init_std: float = 0.02) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.randn(num_experts, width) * init_std)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token to the experts with a positive gate; a token without one gets none."""
        tokens = real_tokens(x, context)
        logits = project(tokens.x, self.weight)
        gates = logits.relu()
        return tokens.assign_where(gates > 0, gates, Evidence(logits=logits, scores=gates))
