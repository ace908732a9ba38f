"""Regularisation around any router: final output masking, and a gate between a dense expert and the others (NLLB).

`moeify.experts.Masked` masks the outputs of single experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, Tokens, project, real_tokens
from moeify.routers.topk import TopK
from moeify.routing import Assignment, Choices


class FinalMask(Router):
    """Drops the combined expert output of a token with probability p, and scales it by 1 / (1 - p) otherwise.

    Final output masking (NLLB, arXiv 2207.04672): to mask Σ_j g_j E_j(x) is to mask the g_j, so a masked token has
    no rows, and they cost nothing. In training only. What the wrapped router chose stays in `assigned`,
    `choices` and `scores`, which losses and controllers use.

    Args:
        router: the router whose decisions are masked; it must give `Assignment`s.
        p: probability that a token is masked.

    Raises:
        ValueError: p outside [0, 1).
    """

    def __init__(self, router: Router, p: float = 0.2) -> None:
        super().__init__()
        _check(p)
        self.router, self.p = router, p
        self.causal, self.weights_sum_to_one = router.causal, router.weights_sum_to_one

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Decide as the wrapped router does, then mask tokens in training."""
        routing = self.router(x, context)
        if not self.training or self.p == 0:
            return routing
        tokens = real_tokens(x, context)
        _, kept = _everywhere(torch.rand(len(tokens.x), device=x.device) >= self.p, tokens)
        default = routing.default_output
        default = None if default is None else default * kept.unsqueeze(1) / (1 - self.p)
        masked = routing.only(kept[routing.source])
        return replace(masked, weight=masked.weight / (1 - self.p), default_output=default)

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p}"


class Conditional(Router):
    """y = (1 - G(x)) · E_E(x) + G(x) · Σ_{j<E} g_j E_j(x), G(x) = sigmoid(w·x + b) (conditional MoE routing, NLLB).

    The last expert is the dense one: every token goes to it, and the wrapped router chooses among the others. As in the
    authors' code (fairseq, branch nllb), a G that is dropped leaves the dense expert alone, and others are scaled up,
    even beyond 1. `moeify.losses.budget` holds the mean of G at a target.

    Args:
        router: the router of the E - 1 other experts; it must give `Assignment`s of one weight per row, and hold no
            experts.
        width: D.
        p: probability that G is dropped.
        init_std: standard deviation of the initialisation of w.

    Raises:
        ValueError: p outside [0, 1); a router with a selection bias.
    """

    def __init__(self, router: Router, width: int, *, p: float = 0.0, init_std: float = 0.02) -> None:
        super().__init__()
        _check(p)
        if any(part._buffers.get("selection_bias") is not None for part in router.modules()):
            raise ValueError(
                "a selection bias is moved by the loads of all experts, and here every token goes to one of them; "
                "balance by a loss instead, with selection_bias=False"
            )
        self.router, self.p = router, p
        self.causal, self.weights_sum_to_one = router.causal, router.weights_sum_to_one
        self.weight = nn.Parameter(torch.randn(1, width) * init_std)
        self.bias = nn.Parameter(torch.zeros(1))

    def rows_per_token(self, tokens: int | None = None) -> float | None:
        """One more than those of the wrapped router."""
        inner = self.router.rows_per_token(tokens)
        return None if inner is None else inner + 1

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Decide as the wrapped router does, then weight its experts by G and the dense one by 1 - G."""
        routing, tokens = self.router(x, context), real_tokens(x, context)
        g = F.dropout(project(tokens.x, self.weight, self.bias).sigmoid().squeeze(-1), self.p, self.training)
        positions, gates = _everywhere(g, tokens)
        every, dense = routing.counts.new_tensor([len(g)]), len(routing.counts)
        rank, choices, before = routing.rank, routing.choices, routing.before_limit
        k = dense if choices is None else choices.k
        if choices is not None:
            choices = Choices(
                indices=F.pad(choices.indices, (0, 1), value=dense),
                weights=torch.stack([*(g * choices.weights.t()), 1 - g], dim=1),
            )
        return replace(
            routing,
            counts=torch.cat([routing.counts, every]),
            before_limit=None if before is None else torch.cat([before, every]),
            source=torch.cat([routing.source, positions]),
            weight=torch.cat([gates[routing.source] * routing.weight, 1 - g]),
            rank=None if rank is None else F.pad(rank, (0, len(g)), value=k),
            choices=choices,
            evidence=replace(
                routing.evidence,
                logits=_beside(routing.logits, torch.finfo(g.dtype).min),  # the router does not choose the dense one
                scores=_beside(routing.scores, 0.0),
            ),
        )

    def extra_repr(self) -> str:
        """The probability that the gate is dropped."""
        return f"p={self.p}"


def _everywhere(value: Tensor, tokens: Tokens) -> tuple[Int[Tensor, "T"], Tensor]:
    """A mask of the real tokens, and their values with 0 for padding."""
    everywhere = torch.arange(math.prod(tokens.shape), device=value.device)
    positions = everywhere if tokens.positions is None else tokens.positions
    return positions, value.new_zeros(len(everywhere)).scatter(0, positions, value)


def _beside(columns: Tensor | None, value: float) -> Tensor | None:
    """One more column, of the same value everywhere."""
    return None if columns is None else F.pad(columns, (0, 1), value=value)


def _check(p: float) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"p={p} is not a probability; choose 0 <= p < 1")


@register("router", "final_mask")
def final_mask(
    width: int, num_experts: int, *, router: Callable[[int, int], Router] = TopK, p: float = 0.2
) -> FinalMask:
    """A `FinalMask` around the router that `router(width, num_experts)` makes, for recipes."""
    return FinalMask(router(width, num_experts), p)


@register("router", "conditional")
def conditional(
    width: int, num_experts: int, *, router: Callable[[int, int], Router] = TopK, p: float = 0.0
) -> Conditional:
    """A `Conditional` around a router of all experts but the last, which is the dense one; for recipes.

    Raises:
        ValueError: fewer than two experts.
    """
    if num_experts < 2:
        raise ValueError("the last expert is the dense one, so that at least two are needed; take more experts")
    return Conditional(router(width, num_experts - 1), width, p=p)
