"""Token rounding: every expert computes whole tiles of rows, around any token-choice router (SonicMoE, 2512.14080).

A tile of rows that is half full costs a kernel as much as a full one. So every expert either drops the weakest tokens
of its last tile, or fills the tile up with those of the highest score among the tokens that did not choose it:

    f = tokens that chose an expert
    f' = round(f)                          to a multiple of the tile
    its rows: the f' best tokens, those that chose it before all others
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, real_tokens
from moeify.routers.topk import TopK
from moeify.routing import Assignment

Rounding = Callable[[Int[Tensor, "E"], int], Int[Tensor, "E"]]


@register("rounding", "down")
def down(counts: Int[Tensor, "E"], tile: int) -> Int[Tensor, "E"]:
    """⌊f / tile⌋ · tile: rows are dropped, none is added."""
    return counts // tile * tile


@register("rounding", "up")
def up(counts: Int[Tensor, "E"], tile: int) -> Int[Tensor, "E"]:
    """⌈f / tile⌉ · tile: rows are added, none is dropped."""
    return down(counts + tile - 1, tile)


@register("rounding", "nearest")
def nearest(counts: Int[Tensor, "E"], tile: int) -> Int[Tensor, "E"]:
    """The nearest multiple of the tile, the lower one in a tie (the paper's NR-f)."""
    return up(counts - tile // 2, tile)


@register("rounding", "balanced")
def balanced(counts: Int[Tensor, "E"], tile: int) -> Int[Tensor, "E"]:
    """Up or down, so that any prefix of the experts has at most half a tile too many or too few rows (Balance-f).

    The paper carries the error over from expert to expert, which equals rounding the cumulative sums.
    """
    return nearest(counts.cumsum(0), tile).diff(prepend=counts.new_zeros(1))


class TokenRounding(Router):
    """Rounds the rows of every expert to a multiple of the tile, in training (SonicMoE, algorithm 4).

    In evaluation nothing is rounded, as in the paper. Rows that are dropped leave the other weights of
    their token as they are; added rows have the score of the router as weight, as in the authors' code
    (Dao-AILab/sonic-moe). What the wrapped router chose stays in `assigned` and `choices`, which losses and
    controllers use. An expert cannot read more tokens than there are: where the next tile would, rows are dropped.

    Args:
        router: the router whose decisions are rounded; it must score all experts for every token.
        tile: rows that a kernel multiplies at once.
        rounding: the number of rows of an expert, for the number of tokens that chose it: `nearest`, `up`, `down` or
            `balanced`.

    Raises:
        ValueError: a tile of less than one row; in `forward`, a decision that does not score all experts for every
            token, has several weights per row, or brings default outputs.
    """

    causal = False

    def __init__(self, router: Router, *, tile: int = 128, rounding: Rounding = nearest) -> None:
        super().__init__()
        if tile < 1:
            raise ValueError(
                f"a tile of {tile} rows holds no token; choose what the kernel multiplies at once, say 128"
            )
        self.router, self.tile, self.rounding = router, tile, rounding

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Decide as the wrapped router does, then round in training."""
        routing = self.router(x, context)
        if not self.training:
            return routing
        _check(routing)
        scores, positions = routing.scores, real_tokens(x, context).positions
        token = routing.source if positions is None else torch.searchsorted(positions, routing.source)
        weight = scores.index_put((token, routing.expert), routing.weight.to(scores.dtype))
        chose = torch.zeros_like(scores, dtype=torch.bool)
        chose[token, routing.expert] = True
        counts = self.rounding(routing.counts, self.tile).clamp(max=len(scores) // self.tile * self.tile)
        expert, token = _best(chose, weight.detach(), counts).t().nonzero(as_tuple=True)
        return replace(
            routing,
            counts=counts,
            before_limit=routing.assigned,
            source=token if positions is None else positions[token],
            weight=weight[token, expert],
            rank=None,
            expert_outputs=None,
        )

    def extra_repr(self) -> str:
        """The tile, and how rows are rounded."""
        return f"tile={self.tile}, rounding={self.rounding.__name__}"


def _best(chose: Bool[Tensor, "T E"], score: Float[Tensor, "T E"], counts: Int[Tensor, "E"]) -> Bool[Tensor, "T E"]:
    """The `counts` best tokens of every expert: first those that chose it, then the others, each by score."""
    tokens = score.argsort(dim=0, descending=True, stable=True)
    tokens = tokens.gather(0, chose.gather(0, tokens).byte().argsort(dim=0, descending=True, stable=True))
    place = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
    return torch.zeros_like(chose).scatter(0, tokens, place < counts)


def _check(routing: Assignment) -> None:
    if routing.has_gate_axis:
        raise ValueError(f"token rounding needs one weight per row, and this router gave {routing.weight[0].numel()}")
    if routing.scores is None or len(routing.scores) != routing.tokens:
        raise ValueError(
            "token rounding needs a router that scores all experts for every token, to know which tokens to add"
        )
    if routing.default_output is not None:
        raise ValueError(
            "token rounding changes which experts run, and this router substitutes a default output for the others"
        )


@register("router", "token_rounding")
def token_rounding(
    width: int,
    num_experts: int,
    *,
    router: Callable[[int, int], Router] = TopK,
    tile: int = 128,
    rounding: Rounding = nearest,
) -> TokenRounding:
    """A `TokenRounding` around the router that `router(width, num_experts)` makes, for recipes."""
    return TokenRounding(router(width, num_experts), tile=tile, rounding=rounding)
