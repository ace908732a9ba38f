"""Small random decisions and layers, and what it means that two of them agree."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from moeify import Assignment, Context, MoE, assign
from moeify.experts import FFN
from moeify.routers import Router, TopK

seeds = st.integers(0, 2**20)


@st.composite
def choices(draw, max_tokens: int = 12, max_experts: int = 6) -> tuple[Tensor, Tensor, int]:
    """Index (T, K), gates (T, K) that require a gradient, and the number of experts."""
    num_experts = draw(st.integers(1, max_experts))
    k = draw(st.integers(1, num_experts))
    tokens = draw(st.integers(1, max_tokens))
    torch.manual_seed(draw(seeds))
    index = torch.rand(tokens, num_experts).topk(k).indices
    return index, torch.rand(tokens, k).requires_grad_(), num_experts


@st.composite
def assignments(draw, max_tokens: int = 12, max_experts: int = 6) -> Assignment:
    """A random token-choice decision."""
    return assign(*draw(choices(max_tokens, max_experts)))


@st.composite
def masks(draw, max_batch: int = 4, max_length: int = 6) -> Tensor:
    """A mask (B, N) with at least one real token in every sequence and at least one of padding in the batch."""
    batch, length = draw(st.integers(1, max_batch)), draw(st.integers(2, max_length))
    torch.manual_seed(draw(seeds))
    mask = torch.rand(batch, length) < 0.6
    mask[:, 0] = True
    mask[0, -1] = False
    return mask


def layer(width: int = 8, num_experts: int = 4, hidden: int = 6, *, router=TopK, **options) -> MoE:
    """A small layer with a router that is far from undecided."""
    moe = MoE(router(width, num_experts, **options), FFN(num_experts, width, hidden))
    sharpen(moe)
    return moe


def sharpen(module: nn.Module) -> None:
    """Give routers weights of unit variance, so that near ties are rare."""
    for part in module.modules():
        if isinstance(part, Router) and isinstance(getattr(part, "weight", None), nn.Parameter):
            nn.init.normal_(part.weight)


def route(router: nn.Module, x: Tensor, mask: Tensor | None = None) -> Assignment:
    """The decision for x, under a token mask."""
    context = Context()
    context.mask(mask)
    return router(x, context)


def gradients(y: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a fixed random projection of y."""
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = torch.autograd.grad((y.double() * direction).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def agree(
    fast: Tensor,
    fast_leaves: Sequence[Tensor],
    slow: Tensor,
    slow_leaves: Sequence[Tensor],
    *,
    rtol: float = 1e-4,
    atol: float = 1e-5,
) -> None:
    """Require equal outputs and equal gradients, whatever the dtypes."""
    torch.testing.assert_close(fast.double(), slow.double(), rtol=rtol, atol=atol)
    for a, b in zip(gradients(fast, fast_leaves), gradients(slow, slow_leaves), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


def doubled(module: nn.Module) -> dict[str, Tensor]:
    """A module's parameters as fp64 leaves of their own, for a slow definition to compute with."""
    return {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
