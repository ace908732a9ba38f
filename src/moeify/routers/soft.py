"""Soft MoE: every slot reads a weighted mean of all tokens, every token a weighted mean of all slots."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router
from moeify.routing import Mixture


@register("router", "soft")
class Soft(Router):
    """D = softmax over tokens, C = softmax over slots, of s · x̂ · μ̂ (Soft MoE, arXiv 2308.00951, eqs. 1-3 and 2.3).

    Nothing is sorted, chosen or dropped, so nothing needs balancing. x̂ and μ̂ are normalised over the width for the
    logits only; padding is masked out of D.

    Args:
        width: D.
        num_experts: E.
        slots: slots per expert, p.
    """

    causal = False

    def __init__(self, width: int, num_experts: int, *, slots: int = 1) -> None:
        super().__init__()
        self.num_experts, self.slots = num_experts, slots
        self.queries = nn.Parameter(torch.randn(num_experts * slots, width) / math.sqrt(width))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Mixture:
        """Mix the tokens of every group (the axis before the width) into the slots, and back."""
        with torch.autocast(x.device.type, enabled=False):
            logits = self.scale.float() * _unit(x.float()) @ _unit(self.queries.float()).t()  # (*B, N, S)
        out_of = logits.softmax(-1)
        mask = context.token_mask
        if mask is not None:
            logits = logits.masked_fill(~mask.view(*x.shape[:-1], 1), float("-inf"))
            out_of = out_of * mask.view(*x.shape[:-1], 1)
        into = logits.softmax(-2)
        groups = math.prod(x.shape[:-2])
        counts = torch.full((self.num_experts,), groups * self.slots, device=x.device)
        return Mixture(counts=counts, into=into, out_of=out_of)


def _unit(v: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    return v * torch.rsqrt(v.square().sum(-1, keepdim=True) + 1e-6)
