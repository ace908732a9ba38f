"""Experts that are looked up: by token id (hash layers), task, cluster, language or modality."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, project, real_tokens
from moeify.routing import Assignment


@register("router", "lookup")
class Lookup(Router):
    """The experts that a fixed table has for what the context says of a token or of its sequence.

    Hash layers (arXiv 2106.04426) look up the token id with weight 1; DeepSeek-V4's hash layers learn the weights of
    the looked-up experts; task, cluster and modality routing look up what their data says.

    Args:
        width: D.
        num_experts: E.
        key: the name of the model's input to look up, of shape (B, N) or (B,).
        size: number of different keys, such as the size of the vocabulary.
        k: experts per key.
        learned: learn the weights: sqrt(softplus) of a projection, normalised; otherwise they are 1 / k.

    Raises:
        ValueError: k outside 1..E; in `forward`, an input that the model was not given or a key beyond the table.
    """

    def __init__(
        self, width: int, num_experts: int, *, key: str = "input_ids", size: int, k: int = 1, learned: bool = False
    ) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(f"k={k} experts per key out of {num_experts}; choose 1 <= k <= {num_experts}")
        self.num_experts, self.key, self.k = num_experts, key, k
        self.preserving = True
        self.register_buffer("table", balanced_table(size, num_experts, k))
        self.weight = nn.Parameter(torch.randn(num_experts, width) * 0.02) if learned else None

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token to the experts of its key."""
        tokens = real_tokens(x, context)
        index = self.table[tokens.keys(context, self.key, len(self.table))]  # (T, k)
        if self.weight is None:
            gates = torch.full(index.shape, 1 / self.k, device=x.device)
            return tokens.assign(index, gates, self.num_experts)
        logits = project(tokens.x, self.weight)
        scores = nn.functional.softplus(logits).sqrt()
        gates = scores.gather(-1, index)
        gates = gates / gates.sum(-1, keepdim=True)
        return tokens.assign(index, gates, self.num_experts, logits=logits, scores=scores)


def balanced_table(size: int, num_experts: int, k: int) -> Int[Tensor, "size k"]:
    """k different experts for every key, each expert equally often, drawn once at random."""
    first = torch.randperm(size) % num_experts
    steps = torch.stack([torch.randperm(num_experts - 1)[: k - 1] for _ in range(size)]) + 1 if k > 1 else None
    others = [] if steps is None else [(first.unsqueeze(1) + steps) % num_experts]
    return torch.cat([first.unsqueeze(1), *others], dim=1)
