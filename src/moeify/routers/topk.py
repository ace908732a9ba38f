"""Token choice: every token takes the k experts that score highest.

Mixtral, Switch, OLMoE, Qwen, DeepSeek, GPT-OSS and most routers of released models are settings of this one router:

    s = score(W x)                     softmax | sigmoid | sqrt(softplus)
    c = s + b   (or W x + b)           the bias changes choices, never weights
    c = expert_groups(c)               experts of the other groups cannot be chosen
    i = topk(c, k);  g = s[i]
    g = g / sum(g);  g = scale · g
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, best_indices, project, real_tokens
from moeify.routers.expert_groups import GroupLimit
from moeify.routing import Assignment, Evidence

Score = Callable[[Tensor], Tensor]


@register("score", "softmax")
def softmax(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """exp(z) / Σ exp(z): experts compete."""
    return logits.softmax(-1)


@register("score", "sigmoid")
def sigmoid(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """1 / (1 + exp(-z)): the score of an expert does not depend on the others (DeepSeek-V3)."""
    return logits.sigmoid()


@register("score", "sqrt_softplus")
def sqrt_softplus(logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """sqrt(log(1 + exp(z))) (DeepSeek-V4)."""
    return F.softplus(logits).sqrt()


@register("router", "topk")
class TopK(Router):
    """Token choice with k experts per token.

    Args:
        width: D.
        num_experts: E.
        k: experts per token.
        score: what turns logits into weights.
        select: whether experts are chosen by their score or by their logit, which differ once there is a bias.
        selection_bias: keep a bias per expert, in fp32, that a controller of `moeify.balance` moves.
        expert_groups: limits the choice to a token's best groups of experts (`ExpertGroups`), or to as many experts of
            every group (`PerGroup`).
        normalize: divide a token's weights by their sum.
        scale: multiplies the weights.
        per: decide for every token, or once for all tokens of a sequence or image from their mean (Mobile V-MoE).
        jitter: multiply the router's input by U(1 - jitter, 1 + jitter) in training; the experts do not see it.
        bias: give the projection a bias of its own (GPT-OSS).
        init_std: standard deviation of the normal initialisation of the projection.

    Raises:
        TypeError: k is no whole number.
        ValueError: k outside 1..E; k = 1 with normalised weights; groups that do not divide E, or that leave other
            than k experts to choose.
    """

    settable_k = True

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 2,
        score: Score = softmax,
        select: Literal["score", "logit"] = "score",
        selection_bias: bool = False,
        expert_groups: GroupLimit | None = None,
        normalize: bool = True,
        scale: float = 1.0,
        per: Literal["token", "sequence"] = "token",
        jitter: float = 0.0,
        bias: bool = False,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts, normalize)
        if expert_groups is not None:
            expert_groups.check(num_experts, k)
        check_per(per)
        self.num_experts = num_experts
        self.k = k
        self.score = score
        self.select = select
        self.expert_groups = expert_groups
        self.normalize = normalize
        self.scale = scale
        self.per = per
        self.causal = per == "token"
        self.weights_sum_to_one = normalize and scale == 1.0
        self.jitter = jitter
        self.weight = nn.Parameter(torch.randn(num_experts, width) * init_std)
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        self.register_buffer("selection_bias", torch.zeros(num_experts).float() if selection_bias else None)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token, or all tokens of every sequence, to its k best experts."""
        tokens = real_tokens(x, context)
        if self.per == "token":
            logits, scores, indices, topk_weights = self.decide(tokens.x)
            return tokens.assign(indices, topk_weights, self.num_experts, Evidence(logits=logits, scores=scores))
        ids, sequence = tokens.sequences()
        logits, scores, indices, topk_weights = self.decide(_mean(tokens.x.float(), sequence, ids.shape[0]))
        evidence = Evidence(logits=logits, scores=scores, sequence_id=ids)
        return tokens.assign(indices[sequence], topk_weights[sequence], self.num_experts, evidence)

    def decide(
        self, units: Float[Tensor, "L D"]
    ) -> tuple[Float[Tensor, "L E"], Float[Tensor, "L E"], Int[Tensor, "L K"], Float[Tensor, "L K"]]:
        """Logits, scores, chosen experts and their weights for tokens, or for the means of sequences."""
        logits = project(self._jittered(units), self.weight, self.bias)
        scores = self.score(logits)
        return logits, scores, *self.choose(logits, scores)

    def choose(
        self, logits: Float[Tensor, "T E"], scores: Float[Tensor, "T E"]
    ) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]:
        """The k experts of every token and their weights."""
        choice = scores if self.select == "score" else logits
        if self.selection_bias is not None:
            choice = choice + self.selection_bias
        if self.expert_groups is not None:
            choice = self.expert_groups(choice)
        indices = best_indices(choice, self.k)
        return indices, self.topk_weights(scores, indices)

    def topk_weights(self, scores: Float[Tensor, "T E"], indices: Int[Tensor, "T K"]) -> Float[Tensor, "T K"]:
        """The weights of chosen experts."""
        topk_weights = scores.gather(-1, indices)
        if self.normalize:
            topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
        return topk_weights * self.scale

    def _jittered(self, tokens: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        if not self.training or self.jitter == 0.0:
            return tokens
        noise = torch.empty_like(tokens, dtype=torch.float32)  # bf16 has four numbers between 0.99 and 1.01
        return tokens * noise.uniform_(1 - self.jitter, 1 + self.jitter)

    def extra_repr(self) -> str:
        """The settings that distinguish token-choice routers."""
        return f"experts={self.num_experts}, k={self.k}, score={self.score.__name__}, normalize={self.normalize}"


def _mean(tokens: Float[Tensor, "T D"], sequence: Int[Tensor, "T"], sequences: int) -> Float[Tensor, "B D"]:
    total = tokens.new_zeros(sequences, tokens.shape[1]).index_add(0, sequence, tokens)
    size = tokens.new_zeros(sequences).index_add(0, sequence, torch.ones_like(tokens[:, 0]))
    return total / size.clamp_min(1).unsqueeze(1)  # rows of a graph may be all padding


def check_k(k: int, num_experts: int, normalize: bool) -> None:
    """Refuse a number of experts per token outside 1..E, or one that gives the router no gradient.

    Raises:
        TypeError: k is no whole number.
        ValueError: k outside 1..E; k = 1 with normalised weights.
    """
    if not isinstance(k, int):
        raise TypeError(f"k={k!r} experts per token is no whole number; choose 1 <= k <= {num_experts}")
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} experts per token out of {num_experts} experts; choose 1 <= k <= {num_experts}")
    if k == 1 and normalize and num_experts > 1:
        raise ValueError(
            "k=1 with normalised weights: every weight is the constant 1, so the router gets no gradient and never "
            "learns; pass normalize=False (Switch) or k=2"
        )


def check_per(per: str) -> None:
    """Refuse an unknown unit of decision.

    Raises:
        ValueError: neither `token` nor `sequence`.
    """
    if per not in ("token", "sequence"):
        raise ValueError(
            f"per={per!r} is not a unit of decision; choose 'token' or 'sequence' (a sequence or an image)"
        )
