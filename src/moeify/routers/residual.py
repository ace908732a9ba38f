"""Gating residuals: a router also reads the logits of the router of the layer before."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, k_best, project, real_tokens
from moeify.routers.topk import check_k
from moeify.routing import Assignment, Evidence


@register("router", "residual")
class Residual(Router):
    """z = W x + W_res z', z' the logits of the previous layer; then softmax, top k, normalised (MoE++, 2410.07348).

    `sparsify` links the layers of a stack; the first has no W_res. The gradient flows on into the earlier routers.

    As in the authors' code (SkyworkAI/MoE-plus-plus), the weight of a zero expert is removed before
    the others are normalised, and the projection of x may be W tanh(V x).

    Args:
        width: D.
        num_experts: E.
        k: experts per token.
        zero_experts: how many experts have a zero output, the last ones; their weights become 0.
        hidden: rows of V; 0 for a projection without it. The authors take 8 E.
        init_std: standard deviation of the initialisation of W, V and W_res.

    Raises:
        ValueError: k outside 2..E; no expert beside zero experts; in `forward`, if the layer before has not decided,
            or for other tokens.
    """

    settable_k = True

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 2,
        zero_experts: int = 0,
        hidden: int = 0,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts, normalize=True)
        if not 0 <= zero_experts < num_experts:
            raise ValueError(
                f"zero_experts={zero_experts} of {num_experts} leaves no other expert; choose 0 <= zero_experts < E"
            )
        self.num_experts, self.k, self.zero_experts, self.init_std = num_experts, k, zero_experts, init_std
        self.weights_sum_to_one = zero_experts < k
        self.weight = nn.Parameter(torch.randn(num_experts, hidden or width) * init_std)
        self.hidden = nn.Parameter(torch.randn(hidden, width) * init_std) if hidden else None
        self.register_parameter("residual", None)
        self._previous: tuple[Router, ...] = ()

    def link_to(self, previous: Router) -> Router:
        """Read the logits of the previous router too."""
        self._previous = (previous,)  # not a submodule: it belongs to its own layer
        self.residual = nn.Parameter(
            self.weight.new_empty(self.num_experts, self.num_experts).normal_(0, self.init_std)
        )
        return self

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token by its own logits and those of the layer before."""
        tokens = real_tokens(x, context)
        read = tokens.x if self.hidden is None else project(tokens.x, self.hidden).tanh()
        logits = project(read, self.weight)
        for previous in self._previous:
            logits = logits + project(self._logits(previous, context, tokens.x.shape[0]), self.residual)
        scores = logits.softmax(-1)
        topk_weights, indices = k_best(scores, self.k)
        topk_weights = topk_weights.masked_fill(indices >= self.num_experts - self.zero_experts, 0.0)
        topk_weights = topk_weights / topk_weights.sum(-1, keepdim=True).clamp_min(torch.finfo(topk_weights.dtype).tiny)
        context.call.decisions[self] = routing = tokens.assign(
            indices, topk_weights, self.num_experts, Evidence(logits=logits, scores=scores)
        )
        return routing

    def _logits(self, previous: Router, context: Context, tokens: int) -> Float[Tensor, "T E"]:
        decided = context.call.decisions.get(previous)
        if decided is None or decided.logits.shape[0] != tokens:
            raise ValueError(
                "the sparse layer before has not routed these tokens in this forward pass; run the whole model, with "
                "one context for its layers"
            )
        return decided.logits

    def extra_repr(self) -> str:
        """Experts per token, and whether there is a layer before."""
        return f"experts={self.num_experts}, k={self.k}, residual={bool(self._previous)}"
