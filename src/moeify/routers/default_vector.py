"""Default MoE: experts that were not chosen contribute a default output, the moving average of their earlier ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify import ranks
from moeify.context import Context, recomputing
from moeify.registry import register
from moeify.routers.base import Router, k_best, project, real_tokens
from moeify.routers.topk import check_k
from moeify.routing import Assignment, Evidence


@register("router", "default_vector")
class DefaultVector(Router):
    """y = Σ_{j in top k} p_j E_j(x) + Σ_{other j} p_j Ê_j, with p = softmax(W x) (Default MoE, arXiv 2504.12463).

    Ê_j ← β Ê_j + (1 - β) · mean of E_j's outputs in the batch, in training, before it is used; it starts at 0, belongs
    to the router's state, and has no gradient. So the router gets one from every expert. A forward pass that activation
    checkpointing repeats leaves Ê as it is. The experts run inside the router, on all ranks for one common Ê.

    Args:
        width: D.
        num_experts: E.
        k: experts per token.
        beta: β.
        width_out: O, D if not given.
        init_std: standard deviation of the projection's initialisation.

    Raises:
        ValueError: k outside 1..E; β outside [0, 1); in `forward`, if no experts were attached.
    """

    settable_k = True

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 2,
        beta: float = 0.9,
        width_out: int | None = None,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts, normalize=False)
        if not 0 <= beta < 1:
            raise ValueError(f"beta={beta} is not the share of the mean to keep; choose 0 <= beta < 1")
        self.num_experts, self.k, self.beta = num_experts, k, beta
        self.weight = nn.Parameter(torch.randn(num_experts, width) * init_std)
        outputs = (num_experts, width if width_out is None else width_out)
        self.register_buffer("default", torch.zeros(outputs, dtype=torch.float32))

    def attach(self, experts: Any) -> None:
        """Keep a reference to the experts whose outputs are averaged."""
        self._experts = (experts,)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token to its k best experts, run them, and substitute the default output of the others."""
        if not self._experts:
            raise ValueError("this router was never given the experts that it averages; put it into a MoE")
        tokens = real_tokens(x, context)
        logits = project(tokens.x, self.weight)
        p = logits.softmax(-1)
        topk_weights, indices = k_best(p, self.k)
        routing = tokens.assign(indices, topk_weights, self.num_experts, Evidence(logits=logits, scores=p))
        outputs = self._experts[0](routing.dispatch(x), routing.counts)
        if self.training and torch.is_grad_enabled() and not recomputing():
            self._update_averages(routing, outputs.detach().float())
        with torch.autocast(x.device.type, enabled=False):
            default_output = p.scatter(-1, indices, 0.0) @ self.default.clone()  # a later pass may change the buffer
        if tokens.positions is not None:
            default_output = default_output.new_zeros(math.prod(tokens.shape), default_output.shape[-1]).index_add(
                0, tokens.positions, default_output
            )
        return replace(routing, expert_outputs=outputs, default_output=default_output)

    @torch.no_grad()
    def _update_averages(self, routing: Assignment, outputs: Float[Tensor, "R O"]) -> None:
        total = torch.zeros_like(self.default).index_add(0, routing.expert, outputs)
        rows = routing.counts.to(total.dtype)
        ranks.all_reduce(total)
        ranks.all_reduce(rows)
        mean = total / rows.clamp_min(1).unsqueeze(1)
        was_used = (rows > 0).unsqueeze(1)
        self.default.copy_(torch.where(was_used, self.beta * self.default + (1 - self.beta) * mean, self.default))

    def extra_repr(self) -> str:
        """Experts per token, and how slowly the mean follows."""
        return f"experts={self.num_experts}, k={self.k}, beta={self.beta}"
