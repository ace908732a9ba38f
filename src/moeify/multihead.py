"""MH-MoE: every token is cut into sub-tokens, which are routed independently and merged again."""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.context import Context
from moeify.experts.ffn import FFN
from moeify.kernels.stacked import Activation, Glu
from moeify.moe import MoE
from moeify.routers.base import Router
from moeify.routers.topk import TopK


class MultiHead(nn.Module):
    """y = W_merge · moe(cut(W_head x)): h sub-tokens of width D / h per token (MH-MoE, arXiv 2404.15045).

    Capacity, losses and statistics of the wrapped layer are over sub-tokens. Padding, and all else that the layer's
    context holds for a token, holds for all sub-tokens of that token.

    Args:
        moe: the wrapped layer, on tokens of width D / h.
        width: D.
        heads: h.

    Raises:
        ValueError: h does not divide D.
    """

    def __init__(self, moe: MoE, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"a width of {width} cannot be cut into {heads} heads; choose a number that divides it")
        self.heads = heads
        self.head, self.merge = nn.Linear(width, width), nn.Linear(width, width)
        self.moe = moe
        nn.init.xavier_uniform_(self.head.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.merge.weight)
        nn.init.zeros_(self.merge.bias)

    def forward(self, x: Float[Tensor, "... N D"]) -> Float[Tensor, "... N D"]:
        """Cut, route and merge."""
        context, parts = self.moe.context, self._cut(self._sequences_first(self.head(x)))
        with context.resumed(context.call.cut(self.heads, x.shape[:-1])):
            y = self.moe(parts)
        return self.merge(self._sequences_first(self._merged(y)))

    def _sequences_first(self, x: Tensor) -> Tensor:
        """Sequences before tokens, (B, N, D), and back: the sub-tokens of a token are adjacent in its sequence."""
        return x if self.moe.context.call.batch_first or x.dim() < 3 else x.transpose(0, 1)

    def _cut(self, x: Float[Tensor, "... N D"]) -> Float[Tensor, "... M d"]:
        return x.unflatten(-1, (self.heads, -1)).flatten(-3, -2)

    def _merged(self, y: Float[Tensor, "... M d"]) -> Float[Tensor, "... N D"]:
        return y.unflatten(-2, (-1, self.heads)).flatten(-2)

    def extra_repr(self) -> str:
        """The number of heads."""
        return f"heads={self.heads}"


_SWIGLU = Glu(F.silu)


def multi_head(
    width: int,
    num_experts: int,
    hidden: int,
    *,
    heads: int,
    k: int = 2,
    router: Callable[..., Router] = TopK,
    activation: Activation = _SWIGLU,
    context: Context | None = None,
) -> MultiHead:
    """A `MultiHead` that costs what k of `num_experts` experts of width `hidden` cost without it, see `matched`.

    Args:
        width: D.
        num_experts: E of the layer that is matched.
        hidden: H of the layer that is matched.
        heads: h.
        k: experts per sub-token, and per token of the layer that is matched.
        router: makes a router from width, number of experts and `k`.
        activation: of the experts.
        context: what the model was called with.

    Raises:
        ValueError: as of `matched`.
    """
    count, narrow = matched(width, num_experts, hidden, heads=heads, k=k, matrices=activation.projections + 1)
    part = width // heads
    experts = FFN(count, part, narrow, activation=activation)
    return MultiHead(MoE(router(part, count, k=k), experts, context=context), width, heads)


def matched(width: int, num_experts: int, hidden: int, *, heads: int, k: int = 2, matrices: int = 3) -> tuple[int, int]:
    """E' and H': the experts on sub-tokens that cost what k of E experts of hidden width H cost (arXiv 2411.16205).

    The two linear layers are paid for by narrower experts: H' = H - 2 D / (k · m), with m the matrices of an expert, so
    that 2 D² + h · k · m · H' · D / h = k · m · H · D. An expert on D / h is h times smaller, so there are
    E' = (E · m · H · D - 2 D²) / (m · H' · D / h) of them, rounded, for as many parameters. The router's own work,
    E · D, becomes E' · D.

    Args:
        width: D.
        num_experts: E.
        hidden: H.
        heads: h.
        k: experts per sub-token, and per token of the layer that is matched.
        matrices: m, 3 with a gate projection and 2 without.

    Raises:
        ValueError: h does not divide D, or experts too narrow to pay for the two linear layers.
    """
    narrow = round(hidden - 2 * width / (k * matrices))
    if narrow < 1:
        raise ValueError(
            f"{k} experts of width {hidden} cost less than two linear layers of width {width}; take more or wider "
            "experts"
        )
    if heads < 1 or width % heads:
        raise ValueError(f"a width of {width} cannot be cut into {heads} heads; choose a number that divides it")
    return round((num_experts * matrices * hidden - 2 * width) * heads / (matrices * narrow)), narrow
