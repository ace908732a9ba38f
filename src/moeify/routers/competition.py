"""CompeteSMoE: in some steps all experts run, the strongest outputs win, and the router learns to predict them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, k_best, project, real_tokens
from moeify.routers.topk import check_k
from moeify.routing import Assignment, Evidence


@register("router", "compete")
class Compete(Router):
    """CompeteSMoE v2 (arXiv 2505.13380): softmax top-k with normalised weights, and competitions in between.

    In a competition the affinity of an expert is the mean of softplus over its output, the k experts of the greatest
    affinity win, and their weights are their affinities, normalised. `begin_step`, which the trainer of `moeify.train`
    calls, selects the layers that compete in a step. Evaluation never competes. The decision of a competition keeps
    `affinity` and the winners' outputs, from which `moeify.losses.distillation` and `diversity` train router and
    experts, and the winners do not run again.

    Args:
        width: D.
        num_experts: E.
        k: experts per token.
        rate: the share of training steps in which the layer competes; 0.07 is the paper's for pre-training.
        most: how many layers of a model may compete in the same step.
        init_std: standard deviation of the projection's initialisation.

    Raises:
        ValueError: k outside 2..E; a rate outside 0..1; in `forward`, a competition without experts.
    """

    settable_k = True

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        k: int = 2,
        rate: float = 0.07,
        most: int = 3,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        check_k(k, num_experts, normalize=True)
        if not 0 <= rate <= 1:
            raise ValueError(f"rate={rate} is not a share of the training steps; choose 0 <= rate <= 1")
        self.num_experts, self.k, self.rate, self.most = num_experts, k, rate, most
        self.weights_sum_to_one = True
        self.competes = False
        self.weight = nn.Parameter(torch.randn(num_experts, width) * init_std)

    def attach(self, experts: Any) -> None:
        """Keep a reference to the experts that compete."""
        self._experts = (experts,)

    def begin_step(self, step: int, seed: int, routers: Sequence[Router]) -> None:
        """Draw whether the layer competes in this step.

        Every `Compete` of a model draws on its own; if more than `most` are drawn, those with the lowest draws compete.
        (The authors' code moves the surplus to neighbouring steps; here it is dropped, so that a draw is a function of
        seed and step alone.)
        """
        competitors = [router for router in routers if isinstance(router, Compete)]
        coin = torch.Generator().manual_seed(seed * 1_000_003 + step)
        draw = torch.rand(len(competitors), generator=coin)
        place = draw.argsort().argsort()
        own = next(i for i, router in enumerate(competitors) if router is self)
        self.competes = bool(draw[own] < self.rate and place[own] < self.most)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token to k experts: those that win, or those that the router predicts."""
        tokens = real_tokens(x, context)
        logits = project(tokens.x, self.weight)
        scores = logits.softmax(-1)
        if not (self.training and self.competes):
            indices, topk_weights = best(scores, self.k)
            return tokens.assign(indices, topk_weights, self.num_experts, Evidence(logits=logits, scores=scores))
        if not self._experts:
            raise ValueError("this router was never given the experts that compete; put it into a MoE, or attach them")
        outputs = self._experts[0].all_outputs(tokens.x)
        affinity = F.softplus(outputs.float()).mean(-1)  # (T, E)
        indices, topk_weights = best(affinity, self.k)
        evidence = Evidence(logits=logits, scores=scores, affinity=affinity)
        routing = tokens.assign(indices, topk_weights, self.num_experts, evidence)
        row = indices.flatten().sort(stable=True).indices  # rows are sorted by expert
        return replace(routing, expert_outputs=outputs[row // self.k, indices.flatten()[row]])

    def extra_repr(self) -> str:
        """How many experts, and how often they compete."""
        return f"experts={self.num_experts}, k={self.k}, rate={self.rate}"


def best(score: Float[Tensor, "T E"], k: int) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]:
    """The k experts with the highest scores of every token, and these scores divided by their sum."""
    score, indices = k_best(score, k)
    return indices, score / score.sum(-1, keepdim=True)
