"""X-MoE: routing on a sphere of few dimensions, against the collapse of representations onto the experts."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, k_best, project, real_tokens
from moeify.routers.topk import check_k
from moeify.routing import Assignment, Evidence


@register("router", "cosine")
class Cosine(Router):
    """z_j = cos(P x, e_j) / τ with a learned temperature τ (X-MoE, arXiv 2204.09179, eqs. 6-7).

    Both sides are normalised, so this is a true cosine; several public implementations normalise the experts only.

    Args:
        width: D.
        num_experts: E.
        k: experts per token.
        dimensions: of the space around the sphere, E / 2 if not given.
        temperature: τ at initialisation.
        normalize: divide a token's weights by their sum.

    Raises:
        ValueError: k outside 1..E; k = 1 with normalised weights; no dimension, or a temperature that is not positive.
    """

    settable_k = True

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 1,
        dimensions: int | None = None,
        temperature: float = 0.3,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        check_k(k, num_experts, normalize)
        dimensions = max(2, num_experts // 2) if dimensions is None else dimensions
        if dimensions < 1 or temperature <= 0:
            raise ValueError(f"dimensions={dimensions} and temperature={temperature} must be positive")
        self.num_experts, self.k, self.normalize = num_experts, k, normalize
        self.weights_sum_to_one = normalize
        self.projection = nn.Parameter(torch.randn(dimensions, width) / math.sqrt(width))
        self.embedding = nn.Parameter(F.normalize(torch.randn(num_experts, dimensions), dim=-1))
        self.log_temperature = nn.Parameter(torch.tensor([math.log(temperature)]))

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token to the experts of the highest cosine."""
        tokens = real_tokens(x, context)
        directions = F.normalize(project(tokens.x, self.projection), dim=-1)
        cosines = project(directions, F.normalize(self.embedding.float(), dim=-1))
        logits = cosines / self.log_temperature.float().exp()
        scores = logits.softmax(-1)
        best, indices = k_best(scores, self.k)
        topk_weights = best / best.sum(-1, keepdim=True) if self.normalize else best
        return tokens.assign(indices, topk_weights, self.num_experts, Evidence(logits=logits, scores=scores))
