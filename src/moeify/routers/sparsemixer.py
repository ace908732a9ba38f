"""SparseMixer-v2: experts are drawn at random in training, and the draw has a gradient."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, project, real_tokens
from moeify.routers.topk import check_k
from moeify.routing import Assignment, Evidence


@register("router", "sparsemixer")
class SparseMixer(Router):
    """k experts drawn one after the other in training, the best ones in evaluation (arXiv 2409.12136; Phi-3.5-MoE).

        z'   = z without the experts drawn before, and without those with (max z - z_j) / max(|z_j|, max z) > 2ε
        p    = softmax(z')
        j    ~ p in training, argmax p in evaluation
        g    = p_j · m,   m = 1 if j = argmax p, else 1 in one case of four and 1/3 in three
        ∂g/∂z = (onehot(j) - p) · p_j        Heun's third-order estimate, for any m

    The k weights are each from a softmax of its own and do not sum to 1.

    Args:
        width: D.
        num_experts: E.
        k: experts per token.
        epsilon: ε; experts further below the best than 2ε of it are not drawn.
        init_std: standard deviation of the projection's initialisation.

    Raises:
        ValueError: k outside 1..E.
    """

    settable_k = True

    def __init__(
        self, width: int, num_experts: int, *, k: int = 2, epsilon: float = 0.01, init_std: float = 0.02
    ) -> None:
        super().__init__()
        check_k(k, num_experts, normalize=False)
        self.num_experts, self.k, self.epsilon = num_experts, k, epsilon
        self.weight = nn.Parameter(torch.randn(num_experts, width) * init_std)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token to k experts, drawn in training."""
        tokens = real_tokens(x, context)
        logits = project(tokens.x, self.weight)
        drawn = torch.zeros_like(logits, dtype=torch.bool)
        indices, topk_weights = [], []
        for _ in range(self.k):
            expert, gate = self.draw(logits, drawn)
            drawn = drawn.scatter(-1, expert, True)
            indices.append(expert)
            topk_weights.append(gate)
        return tokens.assign(
            torch.cat(indices, -1),
            torch.cat(topk_weights, -1),
            self.num_experts,
            Evidence(logits=logits, scores=logits.softmax(-1)),
        )

    def draw(
        self, logits: Float[Tensor, "T E"], drawn: Bool[Tensor, "T E"]
    ) -> tuple[Int[Tensor, "T 1"], Float[Tensor, "T 1"]]:
        """One more expert for every token, and its weight."""
        left = logits.masked_fill(drawn, float("-inf"))
        best = left.detach().amax(-1, keepdim=True)
        far = (best - logits) / logits.abs().maximum(best) > 2 * self.epsilon
        left = left.masked_fill(far, float("-inf"))
        p = left.softmax(-1)
        if not self.training:
            expert = left.argmax(-1, keepdim=True)
            return expert, p.gather(-1, expert)
        gumbel = -torch.empty_like(left).exponential_().log()
        expert = (left + gumbel).argmax(-1, keepdim=True)
        certain = (expert == p.argmax(-1, keepdim=True)) | (torch.rand_like(best) > 0.75)
        return expert, _Heun.apply(logits, p.detach(), expert, torch.where(certain, 1.0, 1 / 3))

    def extra_repr(self) -> str:
        """Experts per token and how far from the best they may be."""
        return f"experts={self.num_experts}, k={self.k}, epsilon={self.epsilon}"


class _Heun(torch.autograd.Function):
    """p_j · m forward, (onehot(j) - p) · p_j backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, p: Tensor, expert: Tensor, m: Tensor) -> Tensor:
        chosen = p.gather(-1, expert)
        ctx.save_for_backward(p, expert, chosen)
        return chosen * m

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        p, expert, chosen = ctx.saved_tensors
        step = upstream[0] * chosen
        return (-p * step).scatter_add(-1, expert, step), None, None, None
