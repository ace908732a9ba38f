"""Expert choice: every expert chooses its top tokens, instead of tokens choosing experts."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, project, real_tokens
from moeify.routing import Assignment, Evidence


@register("router", "expert_choice")
class ExpertChoice(Router):
    """Every expert selects its top `factor · N / E` tokens in a sequence of N (arXiv 2202.09368, eqs. 1-3).

    The number is rounded up. The load is balanced by construction; 0 to E experts select a token. Whether an expert
    selects a token depends on the other tokens of its sequence, later ones included, so decoders cannot use it.

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
        """Let every expert select its tokens; padding is excluded."""
        tokens = real_tokens(x, context)
        logits = project(tokens.x, self.weight)
        scores = logits.softmax(-1)
        sequence = tokens.sequence_id if self.per == "sequence" else torch.zeros_like(tokens.sequence_id)
        chosen = self._taken(scores.detach(), sequence)
        return tokens.assign_where(chosen, scores, Evidence(logits=logits, scores=scores))

    def _taken(self, scores: Float[Tensor, "T E"], sequence: Int[Tensor, "T"]) -> Bool[Tensor, "T E"]:
        """The tokens that each expert selects: the top ones of each sequence, the earlier of two with equal scores."""
        best_first = scores.sort(dim=0, descending=True, stable=True).indices
        within = sequence[best_first].sort(dim=0, stable=True).indices  # each sequence, by score
        by_sequence = best_first.gather(0, within)
        sequence = sequence.sort().values
        first, end = torch.searchsorted(sequence, sequence), torch.searchsorted(sequence, sequence, right=True)
        place = torch.arange(sequence.shape[0], device=sequence.device) - first
        taken = (place < self.slots(end - first)).unsqueeze(1).expand_as(scores)
        return torch.zeros_like(taken).scatter(0, by_sequence, taken)

    def slots(self, tokens: Any) -> Any:
        """Tokens that each expert selects out of `tokens`, an integer or a tensor of integers."""
        parts = 2**20  # integers, since a product of floats may exceed the exact integer and be rounded up
        share = Fraction(int(self.factor * parts), self.num_experts * parts)
        return (share.numerator * tokens + share.denominator - 1) // share.denominator  # OpenVINO rounds towards 0

    def rows_per_token(self, tokens: int | None = None) -> float:
        """Experts per token on average: `factor`, rounding included if the sequence has `tokens` tokens."""
        if tokens is None or self.per == "batch":
            return self.factor
        return self.num_experts * self.slots(tokens) / tokens
