"""GShard: top-2 routing whose second expert is used at random, with a probability that grows with its weight."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, k_best, project, real_tokens
from moeify.routers.topk import check_k
from moeify.routing import Assignment, Evidence


@register("router", "gshard")
class GShard(Router):
    """Two experts per token, the second only with probability min(1, g_2 / threshold) (GShard, algorithm 1).

    The weights are normalised before the second choice is dropped, and the first is not scaled up for it. Put
    `capacity` with priority "choice" around it for GShard's buffers.

    Args:
        width: D.
        num_experts: E.
        threshold: weight from which on the second expert is always used; mesh and ST-MoE use 0.2.
        eval_random: whether evaluation draws as well; otherwise it uses both experts.
        init_std: standard deviation of the projection's initialisation.

    Raises:
        ValueError: fewer than two experts, or a threshold that is not positive.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        threshold: float = 0.2,
        eval_random: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(2, num_experts, normalize=True)
        if threshold <= 0:
            raise ValueError(f"threshold={threshold} is never reached; to use both experts always take TopK(k=2)")
        self.num_experts, self.threshold, self.eval_random = num_experts, threshold, eval_random
        self.weight = nn.Parameter(torch.randn(num_experts, width) * init_std)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token to its first and, by chance, its second expert."""
        tokens = real_tokens(x, context)
        logits = project(tokens.x, self.weight)
        scores = logits.softmax(-1)
        best, indices = k_best(scores, 2)
        topk_weights = best / (best.sum(-1, keepdim=True) + 1e-9)
        if not (self.training or self.eval_random):
            return tokens.assign(indices, topk_weights, self.num_experts, Evidence(logits=logits, scores=scores))
        second = torch.rand_like(topk_weights[:, 1]) < topk_weights[:, 1] / self.threshold
        kept = torch.stack([torch.ones_like(second), second], dim=1)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, indices, kept)
        weight = torch.zeros_like(scores).scatter(-1, indices, topk_weights)
        return tokens.assign_where(chosen, weight, Evidence(logits=logits, scores=scores))

    def rows_per_token(self, tokens: int | None = None) -> float:
        """Two, the number in evaluation."""
        return 2
