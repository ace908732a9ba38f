"""Balanced assignment as optimal transport: Sinkhorn iterations in training, plain top-k in evaluation."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, project, real_tokens
from moeify.routers.topk import check_k
from moeify.routing import Assignment


@register("router", "sinkhorn")
class Sinkhorn(Router):
    """The top k of a transport plan with even marginals (BASE, arXiv 2103.16716; as iterated in Megatron-Core).

    Weights are the router's own: sigmoid for k = 1, softmax for more; no gradient flows through the plan. Which
    expert a token gets in training depends on the whole batch: not for decoders that must not look ahead.

    Args:
        width: D.
        num_experts: E.
        k: experts per token.
        tolerance: mean change of a marginal at which the iteration ends.
        init_std: standard deviation of the projection's initialisation.

    Raises:
        ValueError: k outside 1..E.
    """

    causal = False

    def __init__(
        self, width: int, num_experts: int, *, k: int = 1, tolerance: float = 1e-4, init_std: float = 0.02
    ) -> None:
        super().__init__()
        check_k(k, num_experts, normalize=False)
        self.num_experts, self.k, self.tolerance = num_experts, k, tolerance
        self.weight = nn.Parameter(torch.randn(num_experts, width) * init_std)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route the real tokens evenly in training, greedily in evaluation."""
        tokens = real_tokens(x, context)
        logits = project(tokens.x, self.weight)
        scores = logits.sigmoid() if self.k == 1 else logits.softmax(-1)
        choice = plan(logits.detach(), self.tolerance) if self.training else logits
        index = choice.topk(self.k, dim=-1).indices
        return tokens.assign(index, scores.gather(-1, index), self.num_experts, logits=logits, scores=scores)


def plan(logits: Float[Tensor, "T E"], tolerance: float) -> Float[Tensor, "T E"]:
    """diag(d0) exp(z) diag(d1) with rows that sum to 1 / T and columns that sum to 1 / E."""
    cost = (logits - logits.max()).exp()
    tokens, experts = cost.shape
    d0, d1 = torch.ones_like(cost[:, 0]), torch.ones_like(cost[0])
    change = float("inf")
    while change > tolerance:
        d0 = 1 / tokens / (cost @ d1 + 1e-8)
        new = 1 / experts / (d0 @ cost + 1e-8)
        change, d1 = (new - d1).abs().mean().item(), new
    return d0.unsqueeze(1) * cost * d1
