"""Top-any gating (DynMoE): every expert has its own threshold; a token uses the experts whose threshold it passes."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, project, real_tokens
from moeify.routing import Assignment, Evidence


@register("router", "top_any")
class TopAny(Router):
    """As many experts as a token needs (DynMoE, arXiv 2405.14297), of a number of experts that may grow and shrink.

        s_e = sigmoid(cos(x, w_e) / τ)
        expert e is used where s_e > sigmoid(G_e / τ);  each of the k(x) used ones has the weight 1 / k(x)

    The gradient of the step function is that of s_e - sigmoid(G_e / τ) where that is positive, as in the authors' code.
    A token that passes no threshold has no expert in training, and the one of the highest score in evaluation.
    `moeify.train.AdaptExperts` adds and removes experts.

    Args:
        width: D.
        num_experts: E, the largest number of experts.
        start: how many experts are in use at first, all if not given.
        temperature: τ at initialisation; it is learned, and at least 0.01.

    Raises:
        ValueError: start outside 1..E; a temperature below 0.01.
    """

    in_use: Tensor

    def __init__(self, width: int, num_experts: int, *, start: int | None = None, temperature: float = 1.0) -> None:
        super().__init__()
        start = num_experts if start is None else start
        if not 1 <= start <= num_experts:
            raise ValueError(f"start={start} experts in use out of {num_experts}; choose 1 <= start <= {num_experts}")
        if temperature < _COLDEST:
            raise ValueError(f"temperature={temperature} is below the least, {_COLDEST}")
        self.num_experts = num_experts
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(num_experts, width)))
        self.threshold = nn.Parameter(torch.zeros(num_experts))
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))
        self.register_buffer("in_use", (torch.arange(num_experts) < start).float())

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token to the experts whose thresholds it passes."""
        tokens = real_tokens(x, context)
        scale = self.log_scale.float().clamp(max=-math.log(_COLDEST)).exp()
        cosines = project(F.normalize(tokens.x.float(), dim=-1), F.normalize(self.weight.float(), dim=-1))
        scores = (cosines * scale).sigmoid() * self.in_use
        excess = (scores - (self.threshold.float() * scale).sigmoid()).relu()
        chosen = excess.detach() > 0
        unserved = ~chosen.any(-1, keepdim=True)
        if not self.training:
            best = torch.zeros_like(chosen).scatter(-1, scores.argmax(-1, keepdim=True), True)
            chosen = chosen | (unserved & best)
        step = chosen.float() + excess - excess.detach()
        evidence = Evidence(
            logits=cosines * scale,
            scores=scores,
            rows=self.weight[self.in_use.bool()],
            unserved=(tokens.x.detach().float() * unserved).sum(0),
        )
        return tokens.assign_where(chosen, step / chosen.sum(-1, keepdim=True).clamp_min(1), evidence)


_COLDEST = 0.01
