"""Expert choice: every expert chooses its top tokens, instead of tokens choosing experts."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, project, real_tokens
from moeify.routing import Assignment, Evidence


@register("router", "expert_choice")
class ExpertChoice(Router):
    """Every expert takes the `factor · N / E` tokens it scores highest in a sequence of N (arXiv 2202.09368, eqs. 1-3).

    That number is rounded up. Perfectly balanced by construction; a token is taken by 0 to E experts. A token's chance
    depends on the other tokens of its sequence, later ones included: not for decoders.

    Args:
        width: D.
        num_experts: E.
        factor: experts per token on average.
        per: whether experts choose within each sequence or image (`sequence`), or among all tokens (`batch`).
        init_std: standard deviation of the projection's initialisation.

    Raises:
        ValueError: a factor that is not between 0 and E.
    """

    causal = False

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        factor: float = 2.0,
        per: Literal["sequence", "batch"] = "sequence",
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if not 0 < factor <= num_experts:
            raise ValueError(f"factor={factor} experts per token out of {num_experts}; choose 0 < factor <= E")
        if per not in ("sequence", "batch"):
            raise ValueError(f"experts choose per 'sequence' or per 'batch', not per {per!r}")
        self.num_experts, self.factor, self.per = num_experts, factor, per
        self.weight = nn.Parameter(torch.randn(num_experts, width) * init_std)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Let every expert take its tokens among the real ones."""
        tokens = real_tokens(x, context)
        logits = project(tokens.x, self.weight)
        scores = logits.softmax(-1)
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        for members in tokens.members() if self.per == "sequence" else [torch.arange(len(scores), device=x.device)]:
            taken = scores.detach()[members].topk(self.slots(len(members)), dim=0).indices  # (slots, E)
            chosen[members[taken], torch.arange(self.num_experts, device=x.device)] = True
        return tokens.assign_where(chosen, scores, Evidence(logits=logits, scores=scores))

    def slots(self, tokens: int) -> int:
        """How many of so many tokens every expert takes."""
        return math.ceil(self.factor * tokens / self.num_experts)

    def rows_per_token(self, tokens: int | None = None) -> float:
        """The factor, or what rounding makes of it in a sequence of so many tokens."""
        if tokens is None or self.per == "batch":
            return self.factor
        return self.num_experts * self.slots(tokens) / tokens
