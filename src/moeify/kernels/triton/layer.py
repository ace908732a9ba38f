"""Sparse feed-forward layers in Triton: forward two grouped GEMMs and a combine, backward four and a combine.

    forward     P = W1 x + b1        one kernel, fused with gather and activation
                A = activation(P)
                Y = W2 A + b2
                y = Σ w Y            over the rows of each token

    backward    dA' = W2ᵀ dy         one kernel, fused with dP, w A and <dA', A>
                dW2, db2 = Σ (w A) dy        dW1, db1 = Σ dP x        per expert
                dx = Σ W1ᵀ dP        over the rows of each token

Saved for backward are the tokens x, P and the routing decision: T·D + R·M elements and the decision.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, library

from moeify.kernels.stacked import Stacked
from moeify.kernels.triton.activation import KernelActivation, kernel_activation
from moeify.kernels.triton.activation_backward import activation_backward, weights
from moeify.kernels.triton.autotune import config
from moeify.kernels.triton.combine import combine
from moeify.kernels.triton.launch import in_order
from moeify.kernels.triton.product import product
from moeify.kernels.triton.product_tn import column_sums, product_tn
from moeify.kernels.triton.tiles import tile_table


def sparse_ffn(
    x: Float[Tensor, "T D"],
    experts: Stacked,
    source: Int[Tensor, "R"],
    weight: Float[Tensor, "R"],
    counts: Int[Tensor, "E"],
    order: Int[Tensor, "V"],
    begin: Int[Tensor, "T+1"],
) -> Float[Tensor, "T O"]:
    """`Σ weight[r] · experts(x[source[r]])` over the rows r of each token.

    Under autocast it computes in the autocast dtype, otherwise tokens are cast to the dtype of the weights.

    Args:
        x: tokens.
        experts: weights and activation.
        source: the token that each row reads; rows are sorted by expert.
        weight: top-k weight of each row.
        counts: rows of each expert.
        order: rows sorted by token, see `combine`.
        begin: where the rows of each token begin in `order`.

    Raises:
        ValueError: an activation that no kernel supports.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else experts.up.dtype
    activation = kernel_activation(experts.activation)
    up, up_bias, down, down_bias = (
        None if tensor is None else tensor.to(dtype)
        for tensor in (experts.up, experts.up_bias, experts.down, experts.down_bias)
    )
    differentiable = (x, weight, up, up_bias, down, down_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    up_bias, down_bias, *decision = in_order(up_bias, down_bias, weight, source, counts, order, begin)
    kind = activation.act, activation.gated, activation.alpha, activation.limit
    tokens = x.to(dtype).contiguous()
    y, _ = torch.ops.moeify.sparse_ffn(tokens, up, up_bias, down, down_bias, *decision, *kind, keep)
    return y


@library.custom_op("moeify::sparse_ffn", mutates_args=())
def _forward(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, weight: Tensor,
    source: Tensor, counts: Tensor, order: Tensor, begin: Tensor,
    act: str, gated: bool, alpha: float, limit: float, keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    activation, rows = KernelActivation(act, gated, alpha, limit), len(source)
    size = config("product", x, rows // len(counts), *up.shape[1:], *down.shape[1:])
    table = tile_table(counts, rows, size.m)
    a, before = product(x, source, up, up_bias, table, rows, size, activation, keep=keep)
    y, _ = product(a, None, down, down_bias, table, rows, size)
    return combine(y, weight, order, begin), x.new_empty(0, up.shape[1]) if before is None else before


@_forward.register_fake
def _(x, up, up_bias, down, down_bias, weight, source, counts, order, begin, act, gated, alpha, limit, keep):
    kept = len(source) if keep else 0
    return x.new_empty(len(begin) - 1, down.shape[1]), x.new_empty(kept, up.shape[1])


@library.custom_op("moeify::sparse_ffn_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, before: Tensor, up: Tensor, down: Tensor, down_bias: Tensor | None, weight: Tensor,
    source: Tensor, counts: Tensor, order: Tensor, begin: Tensor,
    act: str, gated: bool, alpha: float, limit: float, wanted: list[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients of x, up, up_bias, down, down_bias and weight; those that are not needed are empty tensors."""
    dy, activation, rows = dy.contiguous(), KernelActivation(act, gated, alpha, limit), len(source)
    for_x, for_up, for_up_bias, for_down, for_down_bias, for_weight = wanted
    widths = *up.shape[1:], *down.shape[1:]
    dx = d_up = d_up_bias = d_down = d_down_bias = d_weight = None
    size = config("activation_backward", x, rows // len(counts), *widths)
    table = tile_table(counts, rows, size.m)
    gradient, weighted, parts = activation_backward(dy, source, weight, down, before, table, size, activation)
    if for_weight:
        d_weight = weights(parts, dy, source, down_bias, table, size.m).to(weight.dtype)
    of_sums = config("product_tn", x, rows // len(counts), *widths)
    if for_down:
        d_down = product_tn(dy, source, weighted, None, counts, down, of_sums)
    if for_down_bias:
        d_down_bias = column_sums(dy, source, weight, counts)
    del weighted
    if for_up:
        d_up = product_tn(gradient, None, x, source, counts, up, of_sums)
    if for_up_bias:
        d_up_bias = column_sums(gradient, None, None, counts)
    if for_x:
        size = config("product", x, rows // len(counts), *widths)
        table = tile_table(counts, rows, size.m)
        rows_dx, _ = product(gradient, None, up.transpose(1, 2), None, table, rows, size)
        dx = combine(rows_dx, None, order, begin)
    found = (dx, d_up, d_up_bias, d_down, d_down_bias, d_weight)
    return [x.new_empty(0) if gradient is None else gradient for gradient in found]


@_backward.register_fake
def _(
    dy, x, before, up, down, down_bias, weight, source, counts, order, begin, act, gated, alpha, limit, wanted,
):  # fmt: skip
    for_x, for_up, for_up_bias, for_down, for_down_bias, for_weight = wanted
    return [
        torch.empty_like(x) if for_x else x.new_empty(0),
        torch.empty_like(up) if for_up else x.new_empty(0),
        up.new_empty(up.shape[:2]) if for_up_bias else x.new_empty(0),
        torch.empty_like(down) if for_down else x.new_empty(0),
        down.new_empty(down.shape[:2]) if for_down_bias else x.new_empty(0),
        torch.empty_like(weight) if for_weight else x.new_empty(0),
    ]


def _keep(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, up, _, down, down_bias, weight, *decision, act, gated, alpha, limit, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], up, down, down_bias, weight, *decision)
    ctx.activation = act, gated, alpha, limit


def _gradients(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:6])
    found = torch.ops.moeify.sparse_ffn_backward(dy, *ctx.saved_tensors, *ctx.activation, wanted)
    return *(g if want else None for g, want in zip(found, wanted, strict=True)), *[None] * 9


_forward.register_autograd(_gradients, setup_context=_keep)
