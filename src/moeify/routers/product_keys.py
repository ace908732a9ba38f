"""Product keys: the best of E experts, up to millions, found by comparing queries with 2·√E half keys (PEER)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, k_best, project, real_tokens
from moeify.routing import Assignment


@register("router", "product_keys")
class ProductKeys(Router):
    """Retrieval by product keys, for each of several heads (Parameter Efficient Expert Retrieval, arXiv 2407.04153).

    Expert e = i · n + j, n = √E, has the key (a_i, b_j), and a token's score is that of its query's halves:

        q, r = W x                          two halves of a query per head
        s_e = q · a_i + r · b_j
        i = topk(s, k);  g = softmax(s[i])  per head

    The k best of E are among the k² pairs of the k best a_i and the k best b_j, so that only 2 n scores per head are
    computed. With experts of one hidden unit, `FFN(E, D, 1)`, this is PEER; a token may use an expert by several heads.

    The decision has no logits, which would be T · E numbers: losses that need them do not apply.

    Args:
        width: D.
        num_experts: E, a square.
        heads: h.
        k: experts per token and head; a token uses h · k.
        dimensions: of a half key.
        init_std: standard deviation of the keys' initialisation; queries start as linear layers do.

    Raises:
        ValueError: E is no square, or k is outside 1..√E.
    """

    def __init__(
        self, width: int, num_experts: int, *, heads: int = 8, k: int = 16, dimensions: int = 64, init_std: float = 0.02
    ) -> None:
        super().__init__()
        side = math.isqrt(num_experts)
        if side**2 != num_experts:
            near = f"{side**2} or {(side + 1) ** 2}"
            raise ValueError(f"product keys number a square of experts, and {num_experts} is none; choose {near}")
        if heads < 1 or not 1 <= k <= side:
            raise ValueError(
                f"each of {heads} heads takes {k} of {side} half keys; choose heads >= 1, and k from 1 to the root of "
                "the number of experts"
            )
        self.num_experts, self.side, self.heads, self.k_per_head, self.k = num_experts, side, heads, k, heads * k
        self.weights_sum_to_one = heads == 1
        self.query = nn.Parameter(torch.empty(2 * heads * dimensions, width).uniform_(-1, 1) / math.sqrt(width))
        self.keys = nn.Parameter(torch.randn(2, heads, side, dimensions) * init_std)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token to the k best experts of each head."""
        tokens = real_tokens(x, context)
        scores, indices = self.retrieve(tokens.x)  # (T, h, k)
        return tokens.assign(indices.flatten(1), scores.softmax(-1).flatten(1), self.num_experts)

    def retrieve(self, x: Float[Tensor, "T D"]) -> tuple[Float[Tensor, "T h k"], Int[Tensor, "T h k"]]:
        """The k best scores of every head and their experts, best first."""
        queries = project(x, self.query).unflatten(-1, (2, self.heads, -1))
        with torch.autocast(x.device.type, enabled=False):
            halves = torch.einsum("tphd,phnd->pthn", queries, self.keys.float())
        (best_a, i), (best_b, j) = (k_best(half, self.k_per_head) for half in halves)
        pairs = (best_a.unsqueeze(-1) + best_b.unsqueeze(-2)).flatten(-2)  # (T, h, k²)
        experts = (i.unsqueeze(-1) * self.side + j.unsqueeze(-2)).flatten(-2)
        scores, best = k_best(pairs, self.k_per_head)
        return scores, experts.gather(-1, best)

    @property
    def keeps_scores(self) -> bool:
        """False: they would be T · E numbers."""
        return False

    def extra_repr(self) -> str:
        """Experts, heads and experts per head."""
        return f"experts={self.num_experts}, heads={self.heads}, k={self.k_per_head}"
