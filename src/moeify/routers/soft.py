"""Soft MoE: every slot reads a weighted mean of all tokens, every token a weighted mean of all slots."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, project, real_tokens
from moeify.routing import Evidence, Mixture


@register("router", "soft")
class Soft(Router):
    """D = softmax over tokens, C = softmax over slots, of s · x̂ · μ̂ (Soft MoE, arXiv 2308.00951, eqs. 1-3 and 2.3).

    Nothing is sorted, chosen or dropped, so nothing needs balancing. x̂ and μ̂ are normalised over the width, for the
    logits only. Tokens are mixed with those of their own sequence or image; padding enters no slot and has no output.

    Args:
        width: D.
        num_experts: E.
        slots: slots per expert, p.

    Raises:
        ValueError: fewer than one slot.
    """

    causal = False

    def __init__(self, width: int, num_experts: int, *, slots: int = 1) -> None:
        super().__init__()
        if slots < 1:
            raise ValueError(f"an expert with {slots} slots reads no tokens; choose slots=1 or more")
        self.num_experts, self.slots = num_experts, slots
        self.queries = nn.Parameter(torch.randn(num_experts * slots, width) / math.sqrt(width))
        self.scale = nn.Parameter(torch.ones(1))  # not a scalar, which FSDP cannot shard

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Mixture:
        """Mix the real tokens of every sequence into the slots, and back."""
        tokens = real_tokens(x, context)
        table, real = tokens.by_sequence()  # (B, N)
        logits = self.logits(tokens.x)[table]  # (B, N, S)
        filling = ~real.unsqueeze(-1)
        return Mixture(
            counts=torch.full((self.num_experts,), table.shape[0] * self.slots, device=x.device),
            into=logits.masked_fill(filling, torch.finfo(logits.dtype).min).softmax(-2),  # a graph has empty rows
            out_of=logits.softmax(-1).masked_fill(filling, 0),
            source=table if tokens.positions is None else tokens.positions[table],
            shape=tokens.shape,
            evidence=Evidence(),  # torch.compile does not make it
        )

    def logits(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T S"]:
        """s · x̂ · μ̂ of every token and slot."""
        return self.scale.float() * project(_unit(x.float()), _unit(self.queries.float()))

    def rows_per_token(self, tokens: int | None = None) -> float:
        """E · p / N; 1 where N is unknown, since the paper uses as many slots as tokens."""
        return 1.0 if tokens is None else self.num_experts * self.slots / tokens

    @property
    def keeps_scores(self) -> bool:
        """False: every token is in all slots, so there is nothing to balance."""
        return False

    @property
    def mixing_flops(self) -> int:
        """A token is added to every slot, and every slot to it."""
        return 2 * 2 * self.queries.numel()


def _unit(v: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    return v * torch.rsqrt(v.square().sum(-1, keepdim=True) + 1e-6)
