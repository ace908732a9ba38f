"""`grouped_linear` in Triton, for experts that are not feed-forward networks, such as low-rank adapters."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, library

from moeify.kernels.triton.autotune import config
from moeify.kernels.triton.combine import combine
from moeify.kernels.triton.launch import in_order
from moeify.kernels.triton.product import product
from moeify.kernels.triton.product_tn import column_sums, product_tn
from moeify.kernels.triton.tiles import tile_table


def grouped_linear(
    x: Float[Tensor, "T D"],
    weight: Float[Tensor, "E O D"],
    counts: Int[Tensor, "E"],
    bias: Float[Tensor, "E O"] | None = None,
    *,
    source: Int[Tensor, "R"] | None = None,
) -> Float[Tensor, "R O"]:
    """Multiply the first `counts[0]` rows by `weight[0]`, the next `counts[1]` by `weight[1]`, and so on.

    Under autocast it computes in the autocast dtype, otherwise x is cast to the dtype of the weight. Two calls compute
    a low-rank adapter, B (A x), of which the first gathers x.

    Args:
        x: rows sorted by expert; with `source`, tokens.
        weight: one matrix per expert, of any strides.
        counts: rows of each expert.
        bias: one vector per expert.
        source: the token that each row reads.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    bias, source = in_order(None if bias is None else bias.to(dtype), source)
    call = x.to(dtype).contiguous(), weight.to(dtype), bias, counts.contiguous(), source
    return torch.ops.moeify.gathered_linear(*call)


@library.custom_op("moeify::gathered_linear", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, source: Tensor | None) -> Tensor:
    rows = len(x) if source is None else len(source)
    size = config("product", x, rows // len(counts), *weight.shape[1:])
    return product(x, source, weight, bias, tile_table(counts, rows, size.m), rows, size)[0]


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, source: Tensor | None) -> Tensor:
    return x.new_empty(len(x) if source is None else len(source), weight.shape[1])


@library.custom_op("moeify::gathered_linear_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor, source: Tensor | None, wanted: list[bool]
) -> list[Tensor]:
    """The gradients of x, weight and bias; those that are not needed are empty tensors."""
    dy, rows = dy.contiguous(), len(dy)
    for_x, for_weight, for_bias = wanted
    dx = d_weight = d_bias = None
    if for_x:
        size = config("product", x, rows // len(counts), *weight.shape[1:])
        dx, _ = product(dy, None, weight.transpose(1, 2), None, tile_table(counts, rows, size.m), rows, size)
        if source is not None:
            dx = combine(dx, None, source.argsort(stable=True), _begin(source, len(x)))
    if for_weight:
        d_weight = product_tn(
            dy, None, x, source, counts, weight, config("product_tn", x, rows // len(counts), *weight.shape[1:])
        )
    if for_bias:
        d_bias = column_sums(dy, None, None, counts)
    return [x.new_empty(0) if gradient is None else gradient for gradient in (dx, d_weight, d_bias)]


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor, source: Tensor | None, wanted: list[bool]) -> list[Tensor]:
    for_x, for_weight, for_bias = wanted
    return [
        x.new_empty(x.shape if for_x else 0),
        torch.empty_like(weight) if for_weight else x.new_empty(0),
        weight.new_empty(weight.shape[:2] if for_bias else 0),
    ]


def _begin(source: Int[Tensor, "R"], tokens: int) -> Int[Tensor, "T+1"]:
    """The offset of each token's rows once rows are sorted by token, and R."""
    return source.new_zeros(tokens + 1).index_add(0, source + 1, torch.ones_like(source)).cumsum(0)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, counts, source = inputs
    ctx.save_for_backward(x, weight, counts, source)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    found = torch.ops.moeify.gathered_linear_backward(dy, *ctx.saved_tensors, wanted)
    return *(g if want else None for g, want in zip(found, wanted, strict=True)), None, None


_forward.register_autograd(_gradients, setup_context=_keep)
