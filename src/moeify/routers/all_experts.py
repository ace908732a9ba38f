"""Every token goes to every expert, weighted by a softmax: a dense mixture for experts as cheap as LoRA (LoRAMoE)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, project, real_tokens
from moeify.routing import Assignment, Evidence


@register("router", "all")
class AllExperts(Router):
    """ω = softmax(W x);  y = Σ_j ω_j E_j(x) over all experts (LoRAMoE, arXiv 2312.09979).

    The decision keeps the type of the sample that each token is of, where the model is called with one, for
    `moeify.losses.localized`.

    Args:
        width: D.
        num_experts: E.
        key: the name of the model's input that holds the type, of shape (B,) or (B, N).
        init_std: standard deviation of the normal initialisation of W.
    """

    weights_sum_to_one = True

    def __init__(self, width: int, num_experts: int, *, key: str = "task_type", init_std: float = 0.02) -> None:
        super().__init__()
        self.num_experts, self.k, self.key = num_experts, num_experts, key
        self.weight = nn.Parameter(torch.randn(num_experts, width) * init_std)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Give every real token to all experts."""
        tokens = real_tokens(x, context)
        logits = project(tokens.x, self.weight)
        scores = logits.softmax(-1)
        indices = torch.arange(self.num_experts, device=x.device).expand(scores.shape[0], -1)
        label = tokens.keys(context, self.key) if context.look_up(self.key) is not None else None
        evidence = Evidence(logits=logits, scores=scores, label=label)
        return tokens.assign(indices, scores, self.num_experts, evidence)
