"""S-BASE, balanced assignment as optimal transport: Sinkhorn iterations in training, plain top-k in evaluation."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, library, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, best_indices, project, real_tokens
from moeify.routers.topk import check_k
from moeify.routing import Assignment, Evidence


@register("router", "sinkhorn")
class Sinkhorn(Router):
    """The top k of a transport plan with even marginals (S-BASE, arXiv 2202.01169; as iterated in Megatron-Core).

    Weights are the router's own: sigmoid for k = 1, softmax for more; no gradient flows through the plan. Which
    expert a token gets in training depends on the whole batch: not for decoders that must not look ahead.

    Args:
        width: D.
        num_experts: E.
        k: experts per token.
        tolerance: mean relative change of a marginal's factor at which the iteration ends.
        init_std: standard deviation of the projection's initialisation.

    Raises:
        ValueError: k outside 1..E.
    """

    settable_k = True
    causal = False

    def __init__(
        self, width: int, num_experts: int, *, k: int = 1, tolerance: float = 1e-4, init_std: float = 0.02
    ) -> None:
        super().__init__()
        check_k(k, num_experts, normalize=False)
        self.num_experts, self.k, self.tolerance = num_experts, k, tolerance
        self.weight = nn.Parameter(torch.randn(num_experts, width) * init_std)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route the real tokens evenly in training, greedily in evaluation."""
        tokens = real_tokens(x, context)
        logits = project(tokens.x, self.weight)
        scores = logits.sigmoid() if self.k == 1 else logits.softmax(-1)
        choice = plan(logits.detach(), self.tolerance) if self.training else logits
        indices = best_indices(choice, self.k)
        return tokens.assign(
            indices, scores.gather(-1, indices), self.num_experts, Evidence(logits=logits, scores=scores)
        )


@library.custom_op(
    "moeify::sinkhorn_plan",
    mutates_args=(),
    schema="(Tensor logits, float tolerance, int iterations=1000) -> Tensor",
)
def plan(logits: Float[Tensor, "T E"], tolerance: float, iterations: int = 1000) -> Float[Tensor, "T E"]:
    """exp(z + f + g), where f makes every row sum to 1 / T and g every column to 1 / E, alternately.

    In logarithms nothing overflows, and the tolerance is relative. It is one operator, as no compiler knows how many
    iterations the values take.

    Args:
        logits: z.
        tolerance: mean change of g at which the iteration ends.
        iterations: at most; each brings the rows closer, and the columns are exact after each.
    """
    tokens, experts = logits.shape
    f, g = torch.zeros_like(logits[:, :1]), torch.zeros_like(logits[0])
    for _ in range(iterations):
        f = -(logits + g).logsumexp(1, keepdim=True) - math.log(tokens)
        before, g = g, -(logits + f).logsumexp(0) - math.log(experts)
        if (g - before).abs().mean() <= tolerance:
            break
    return (logits + f + g).exp()


@plan.register_fake
def _(logits: Tensor, tolerance: float, iterations: int = 1000) -> Tensor:
    return torch.empty_like(logits)
