"""Routing replay (R3): decisions as they were recorded in a rollout, for reinforcement learning and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.context import Context, recomputing
from moeify.routers.base import Router, real_tokens
from moeify.routers.topk import TopK
from moeify.routing import Assignment, Routing


class Replay(Router):
    """A router that returns recorded decisions, one per forward pass (R3, arXiv 2510.11370).

    A forward pass that activation checkpointing repeats gets the latest decision again. `moeify.record.replay` puts
    this in the place of every router of a model.

    Args:
        router: the router that made them.
        decisions: what it decided, in the order of the forward passes.
        weights: `recorded` returns the weights as constants; `recomputed` keeps the recorded experts and weights
            them by the current scores of the router, which thereby gets gradients.

    Raises:
        ValueError: recomputed weights for a router other than a `TopK` that decides token by token; in `forward`, more
            passes than decisions, or tokens of another shape than the recorded ones.
    """

    def __init__(
        self,
        router: Router,
        decisions: Sequence[Routing],
        *,
        weights: Literal["recorded", "recomputed"] = "recorded",
    ) -> None:
        super().__init__()
        if weights == "recomputed" and not (isinstance(router, TopK) and router.per == "token"):
            raise ValueError(
                f"only a TopK that decides token by token can recompute the weights of recorded choices, and this is a "
                f"{type(router).__name__}; use weights='recorded'"
            )
        self.router = router
        self.decisions = [replace(decision.detached(), expert_outputs=None) for decision in decisions]
        self.weights = weights
        self.replayed = 0
        self.causal, self.weights_sum_to_one = router.causal, router.weights_sum_to_one

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Routing:
        """The next recorded decision."""
        decision = self._next()
        if not decision.fits(x.shape[:-1]):
            raise ValueError(
                f"the recorded decision is for tokens of shape {tuple(decision.shape)}, and the layer was given "
                f"{tuple(x.shape[:-1])}; replay the inputs that were recorded"
            )
        return decision if self.weights == "recorded" else self._reweighed(decision, x, context)

    def _next(self) -> Routing:
        if not (recomputing() and self.replayed):
            if self.replayed == len(self.decisions):
                raise ValueError(
                    f"all {self.replayed} recorded decisions have been replayed; record one per forward pass"
                )
            self.replayed += 1
        return self.decisions[self.replayed - 1]

    def _reweighed(self, decision: Routing, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        assert isinstance(decision, Assignment)
        assert isinstance(self.router, TopK)
        assert decision.choices is not None
        assert decision.rank is not None
        tokens = real_tokens(x, context)
        logits, scores, *_ = self.router.decide(tokens.x)
        topk_weights = self.router.topk_weights(scores, decision.choices.indices)
        token = decision.source if tokens.positions is None else torch.searchsorted(tokens.positions, decision.source)
        return replace(
            decision,
            weight=topk_weights[token, decision.rank],
            choices=replace(decision.choices, weights=topk_weights),
            evidence=replace(decision.evidence, logits=logits, scores=scores),
        )
