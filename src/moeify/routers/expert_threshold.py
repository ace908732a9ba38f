"""Expert threshold, a causal expert choice: an expert selects the tokens whose logit reaches its moving cut-off."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, project, real_tokens
from moeify.routing import Assignment, Evidence


@register("router", "expert_threshold")
class ExpertThreshold(Router):
    """Every expert selects the tokens whose logit reaches its cut-off, z_j = w_j · x >= c_j, with weight sigmoid(z_j).

    Expert Threshold (arXiv 2603.11535), with cut-offs on logits and the sigmoid as in the authors' code, which by
    default also divides the weights by the number of experts that selected the token. A decision depends on its token
    alone, so it is causal; 0 to E experts select a token. The cut-offs are a buffer, `selection_bias` = -c, which
    starts at 0; `moeify.balance.CutOff` moves it to where each expert gets its share.

    Args:
        width: D.
        num_experts: E.
        init_std: standard deviation of the projection's initialisation.
    """

    select = "logit"  # what controllers add the bias to

    def __init__(self, width: int, num_experts: int, *, init_std: float = 0.02) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.randn(num_experts, width) * init_std)
        self.register_buffer("selection_bias", torch.zeros(num_experts, dtype=torch.float32))

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Give every real token to the experts whose cut-off it reaches."""
        tokens = real_tokens(x, context)
        logits = project(tokens.x, self.weight)
        scores = logits.sigmoid()
        return tokens.assign_where(logits + self.selection_bias >= 0, scores, Evidence(logits=logits, scores=scores))
