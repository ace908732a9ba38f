"""The rule for expert threshold: it moves the cut-off above which an expert selects a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.balance.rules import Rule
from moeify.registry import register
from moeify.routing import Assignment


@register("controller", "cut_off")
@dataclass(frozen=True)
class CutOff(Rule):
    """m_j ← ema · m_j + (1 - ema) · the (factor · T / E)-th largest logit of expert j; -b_j = c_j = m_j / (1 - ema^n).

    That is the logit at which expert choice would have cut off its tokens, averaged over the micro-batches and ranks of
    a step. n is the number of steps: the correction of a mean that started at 0, as in the code of Expert Threshold
    (arXiv 2603.11535). For `moeify.routers.ExpertThreshold`. The first step takes the cut-offs as they are.

    Attributes:
        factor: experts per token on average.
        ema: weight of the old cut-offs in the moving average.
    """

    factor: float = 2.0
    ema: float = 0.99

    def observe(
        self, routing: Assignment, unbiased: Float[Tensor, "L E"] | None, bias: Float[Tensor, "E"]
    ) -> dict[str, Tensor]:
        """The cut-offs of this micro-batch, and a count of 1.

        Raises:
            ValueError: the decision keeps no logits, or `factor` is larger than E.
        """
        if unbiased is None:
            raise ValueError("cut-offs need a router that keeps its logits")
        tokens, num_experts = unbiased.shape
        if not 0 < self.factor <= num_experts:
            raise ValueError(f"factor={self.factor} experts per token out of {num_experts}; choose 0 < factor <= E")
        rank = max(1, round(self.factor * tokens / num_experts))
        cut_off = unbiased.detach().float().topk(rank, dim=0).values[-1]
        return {"cut_off": cut_off, "batches": cut_off.new_ones(())}

    def move(self, bias: Float[Tensor, "E"], seen: dict[str, Tensor], memory: dict[str, Tensor]) -> Float[Tensor, "E"]:
        """The mean of the cut-offs of the micro-batches, averaged into the old cut-offs."""
        n = int(memory.get("steps", 0)) + 1
        memory["steps"] = torch.tensor(float(n), dtype=torch.float32)
        kept = self.ema * (1 - self.ema ** (n - 1)) / (1 - self.ema**n)
        return kept * bias - (1 - kept) * seen["cut_off"] / seen["batches"]
