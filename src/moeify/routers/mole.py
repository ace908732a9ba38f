"""MoLE: a gate that reads the outputs of all experts, to compose adapters that are trained already."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, project, real_tokens
from moeify.routing import Assignment, Evidence


@register("router", "mole")
class MoLE(Router):
    """All experts run, and a learned gate reads all outputs to weight them (arXiv 2404.13628, eqs. 9-12).

        a = normalised(E_1(x) ⊕ ... ⊕ E_E(x))      side by side, mean 0 and variance 1
        ε = W a
        g = softmax(ε / τ);  y = Σ_j g_j E_j(x)     W and τ are learned

    The paper flattens the outputs for all tokens of an input of fixed length; here every token is gated by itself, as
    language needs. The decision keeps the outputs, so that the experts do not run again.

    Args:
        width: D.
        num_experts: E.
        temperature: τ at the start.
        init_std: standard deviation of the initialisation of W.

    Attributes:
        weight: W, (E, E · O); there once the router has its experts.

    Raises:
        ValueError: a temperature that is not positive; in `forward`, no experts.
    """

    weights_sum_to_one = True

    def __init__(self, width: int, num_experts: int, *, temperature: float = 1.0, init_std: float = 0.02) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature={temperature} divides logits; choose temperature > 0")
        self.width, self.num_experts, self.k, self.init_std = width, num_experts, num_experts, init_std
        self.log_temperature = nn.Parameter(torch.tensor([temperature]).log())  # not a scalar, which FSDP cannot shard
        self.register_parameter("weight", None)

    def attach(self, experts: Any) -> None:
        """Keep a reference to the experts, and make W as wide as their outputs."""
        self._experts = (experts,)
        like = next(experts.parameters(), self.log_temperature)
        with torch.no_grad():
            outputs = experts.all_outputs(torch.zeros(1, self.width, dtype=like.dtype, device=like.device))
        if self.weight is None or self.weight.shape[1] != outputs.numel():
            weight = torch.randn(self.num_experts, outputs.numel(), device=like.device) * self.init_std
            self.weight = nn.Parameter(weight.to(like.dtype))

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Run all experts on every real token, and weight their outputs."""
        if self.weight is None:
            raise ValueError(
                "this router was never given the experts that it weights; put it into a MoE, or attach them"
            )
        tokens = real_tokens(x, context)
        outputs = self._experts[0].all_outputs(tokens.x)  # (T, E, O)
        seen = F.layer_norm(outputs.float().flatten(1), self.weight.shape[1:])
        logits = project(seen, self.weight) / self.log_temperature.float().exp()
        scores = logits.softmax(-1)
        indices = torch.arange(self.num_experts, device=x.device).expand(scores.shape[0], -1)
        routing = tokens.assign(indices, scores, self.num_experts, Evidence(logits=logits, scores=scores))
        return replace(routing, expert_outputs=outputs.transpose(0, 1).flatten(0, 1))  # rows are sorted by expert

    def extra_repr(self) -> str:
        """How many experts it weights."""
        return f"experts={self.num_experts}"
