"""A sparse layer of feed-forward experts on a CPU, block by block: gather, up projection, activation, down, combine.

A block has a few hundred rows, so that intermediate activations stay in cache for any number of tokens. The backward
pass writes weight gradients only of experts with rows, and copies no weights.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeify.kernels.cpu.activation import hidden_units, with_pullback
from moeify.kernels.cpu.gradients import Place, place_for
from moeify.kernels.cpu.segments import Block, Matrices, blocks, multiply_rows, multiply_rows_tn, span
from moeify.kernels.naive import naive_grouped_linear
from moeify.kernels.stacked import Activation, Stacked

_ROWS = 512  # rows of a block


def run_layer(
    x: Float[Tensor, "T D"],
    source: Int[Tensor, "R"],
    weight: Float[Tensor, "R"],
    counts: Int[Tensor, "E"],
    stacked: Stacked,
    dtype: torch.dtype,
    *,
    keep: bool = True,
) -> Float[Tensor, "T O"]:
    """`y[source] += weight · down(activation(up(x[source])))`, differentiable in the tokens and all weights.

    Args:
        x: the tokens.
        source: the token of every row; rows are sorted by expert.
        weight: what every row's expert output is multiplied by.
        counts: rows of each expert.
        stacked: the experts.
        dtype: compute dtype, and that of y; expert outputs are summed in fp32.
        keep: save the inputs of the activation, (R, M), for the backward pass instead of recomputing them.
    """
    learned = (x, weight, stacked.up, stacked.up_bias, stacked.down, stacked.down_bias)
    return _Layer.apply(*learned, source, counts, stacked.activation, dtype, keep)


def infer_layer(
    x: Float[Tensor, "T D"],
    source: Int[Tensor, "R"],
    weight: Float[Tensor, "R"],
    counts: list[int],
    stacked: Stacked,
    dtype: torch.dtype,
    *,
    packed: tuple[Matrices, Matrices] | None = None,
    kept: list[Tensor] | None = None,
) -> Float[Tensor, "T O"]:
    """`run_layer` without gradients.

    Args:
        x: the tokens.
        source: the token of every row; rows are sorted by expert.
        weight: what every row's expert output is multiplied by.
        counts: rows of each expert.
        stacked: the experts.
        dtype: compute dtype, and that of y; expert outputs are summed in fp32.
        packed: the up and down projections in oneDNN's packed layout.
        kept: a list to which the inputs of the activation of each block are appended.
    """
    up, down = packed or (stacked.up, stacked.down)
    y = x.new_zeros(len(x), stacked.down.shape[1], dtype=_wide(dtype))
    for block in blocks(counts, _ROWS, whole=kept is not None):
        token, scale = source[span(block)], weight[span(block)].to(y.dtype).unsqueeze(1)
        before = multiply_rows(x.index_select(0, token).to(dtype), up, stacked.up_bias, block)
        if kept is not None:
            kept.append(before)
        hidden = hidden_units(before, stacked.activation)
        del before  # free the activations of a block as early as possible
        y.index_add_(0, token, multiply_rows(hidden, down, stacked.down_bias, block).to(y.dtype).mul_(scale))
        del hidden
    return y.to(dtype)


def define_layer(
    x: Float[Tensor, "T D"],
    source: Int[Tensor, "R"],
    weight: Float[Tensor, "R"],
    counts: Int[Tensor, "E"],
    stacked: Stacked,
    dtype: torch.dtype,
) -> Float[Tensor, "T O"]:
    """The definition of `run_layer`, differentiated by autograd."""
    up, up_bias, down, down_bias = (
        None if tensor is None else tensor.to(dtype)
        for tensor in (stacked.up, stacked.up_bias, stacked.down, stacked.down_bias)
    )
    assert up is not None
    assert down is not None
    hidden = stacked.activation(naive_grouped_linear(x[source].to(dtype), up, counts, up_bias))
    outputs = naive_grouped_linear(hidden, down, counts, down_bias)
    y = x.new_zeros(len(x), stacked.down.shape[1], dtype=_wide(dtype))
    return y.index_add(0, source, outputs * weight.to(y.dtype).unsqueeze(1)).to(dtype)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
        source: Tensor, counts: Tensor, activation: Activation, dtype: torch.dtype, keep: bool,
    ) -> Tensor:  # fmt: skip
        kept: list[Tensor] | None = [] if keep else None
        ctx.counts, ctx.activation, ctx.dtype = counts.tolist(), activation, dtype
        y = infer_layer(
            x, source, weight, ctx.counts, Stacked(up, up_bias, down, down_bias, activation), dtype, kept=kept
        )
        ctx.save_for_backward(x, weight, up, up_bias, down, down_bias, source, counts, *kept or ())
        return y

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        find = _differentiable_gradients if torch.is_grad_enabled() else _gradients
        return *find(ctx, *gradient), None, None, None, None, None


def _gradients(ctx: Any, gradient: Float[Tensor, "T O"]) -> list[Tensor | None]:
    saved: Any = ctx.saved_tensors
    x, weight, up, up_bias, down, down_bias, source, _, *kept = saved
    for_x, for_weight, for_up, for_up_bias, for_down, for_down_bias = ctx.needs_input_grad[:6]
    dtype, through_inner = ctx.dtype, for_x or for_up or for_up_bias
    dx = torch.zeros_like(x, dtype=_wide(dtype)) if for_x else None
    dweight = torch.empty_like(weight)
    wanted = zip((up, up_bias, down, down_bias), (for_up, for_up_bias, for_down, for_down_bias), strict=True)
    dup, dup_bias, ddown, ddown_bias = (place_for(learnt, ctx.counts) if want else None for learnt, want in wanted)
    for number, block in enumerate(blocks(ctx.counts, _ROWS)):
        token, scale = source[span(block)], weight[span(block)].to(dtype).unsqueeze(1)
        rows, dy = x.index_select(0, token).to(dtype), gradient.index_select(0, token)
        before = kept[number] if kept else multiply_rows(rows, up, up_bias, block)
        hidden, pullback = with_pullback(before, ctx.activation)
        _weight_gradient(dy * scale, hidden, ddown, ddown_bias, block)
        if not (through_inner or for_weight):
            continue
        dhidden = multiply_rows(dy, down.transpose(1, 2), None, block)
        dbefore, dweight[span(block)] = pullback(dhidden, weight[span(block)])
        if down_bias is not None:
            dweight[span(block)] += multiply_rows(dy, down_bias.unsqueeze(1), None, block).squeeze(1)
        if not through_inner:
            continue
        _weight_gradient(dbefore, rows, dup, dup_bias, block)
        if dx is not None:
            dx.index_add_(0, token, multiply_rows(dbefore, up.transpose(1, 2), None, block).to(dx.dtype))
    of_weights = (None if place is None else place.gradient for place in (dup, dup_bias, ddown, ddown_bias))
    return [None if dx is None else dx.to(x.dtype), dweight if for_weight else None, *of_weights]


def _weight_gradient(
    gradient: Float[Tensor, "B O"],
    rows: Float[Tensor, "B D"],
    weight: Place | None,
    bias: Place | None,
    block: Block,
) -> None:
    """Write the gradients of a projection's weight and bias, where they are needed."""
    if weight is not None:
        multiply_rows_tn(gradient, rows, weight.into, block, add=weight.adds)
    if bias is not None:
        ones = gradient.new_ones(len(gradient), 1)
        multiply_rows_tn(gradient, ones, bias.into.unsqueeze(2), block, add=bias.adds)


def _differentiable_gradients(ctx: Any, gradient: Float[Tensor, "T O"]) -> list[Tensor | None]:
    """Gradients that are differentiable themselves (double backward): those of `define_layer`."""
    *inputs, source, counts = ctx.saved_tensors[:8]
    learned: Any = [None if i is None else i.view_as(i) for i in inputs]  # views, as weights may be computed from x
    x, weight, up, up_bias, down, down_bias = learned
    y = define_layer(x, source, weight, counts, Stacked(up, up_bias, down, down_bias, ctx.activation), ctx.dtype)
    needed = ctx.needs_input_grad[:6]
    wanted = [i for i, need in zip(learned, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=True))
    return [next(found) if need else None for need in needed]


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which expert outputs are summed."""
    return torch.promote_types(dtype, torch.float32)
