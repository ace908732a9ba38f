"""Sparse layers for few tokens (decoding), memory-bound: the weights of the selected experts are read once, in place.

Every (token, expert) pair is a vector times two matrices. One kernel computes A = activation(W1 x + b1), one program
per few hidden units of each pair; a second sums Σ w (W2 A + b2), one program per few outputs of each token. There are
enough programs to occupy a GPU, so no split-K is needed. Neither rows nor weights are sorted, copied or padded, and
weights may be int8 or int4 (`moeify.experts.quantized`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor, library

from moeify.kernels.stacked import Activation
from moeify.kernels.triton.activation import activate, gated, kernel_activation
from moeify.kernels.triton.launch import INTERPRETED, in_order, launch

PROGRAMS = 512
"""Programs that occupy a GPU: four for each of about 128 multiprocessors."""
NUMBERS = 1024 if INTERPRETED else 4096
"""Weights per load of a program; six programs per multiprocessor have 48 KB of bf16 loads in flight."""


@dataclass(frozen=True)
class Matrices:
    """A projection of all experts in its storage format.

    Attributes:
        weight: floats (E, O, D) with any strides, int8 (E, O, D), or int4 packed two per byte (E, O, bytes).
        bias: biases.
        scales: quantisation scales: one per row for int8, one per group for int4.
    """

    weight: Tensor
    bias: Float[Tensor, "E O"] | None
    scales: Float[Tensor, "E O *groups"] | None = None


def decode(
    x: Float[Tensor, "T D"],
    index: Int[Tensor, "T K"],
    topk_weights: Float[Tensor, "T K"],
    up: Matrices,
    down: Matrices,
    hidden: int,
    activation: Activation,
) -> Float[Tensor, "T O"]:
    """`Σ topk_weights · experts(x)` for few tokens, without gradients.

    Args:
        x: tokens, in the compute dtype.
        index: the selected experts of each token.
        topk_weights: their top-k weights.
        up: the up projection.
        down: the down projection.
        hidden: H, the number of hidden units per expert.
        activation: the activation between the projections.
    """
    n = kernel_activation(activation)
    projections = (up.weight, *in_order(up.bias, up.scales), down.weight, *in_order(down.bias, down.scales))
    call = (*in_order(x, index, topk_weights), *projections, hidden, n.act, n.gated, n.alpha, n.limit)
    return torch.ops.moeify.decode(*call)


@library.custom_op("moeify::decode", mutates_args=())
def _decode(
    x: Tensor, index: Tensor, topk_weights: Tensor,
    up: Tensor, up_bias: Tensor | None, up_scales: Tensor | None,
    down: Tensor, down_bias: Tensor | None, down_scales: Tensor | None,
    hidden: int, act: str, gated: bool, alpha: float, limit: float,
) -> Tensor:  # fmt: skip
    up, down = _words(up), _words(down)
    (tokens, k), (width, width_out) = index.shape, (x.shape[1], down.shape[1])
    a, y = x.new_empty(tokens * k, hidden), x.new_empty(tokens, width_out)
    units = _units(tokens * k * hidden)
    launch(
        _hidden_units,
        tokens * k * triton.cdiv(hidden, units),
        *(x, index, up, up_bias, up_scales, a, tokens * k, k, hidden, width, *up.stride(), alpha, limit),
        ACT=act, GATED=gated, **_stored(up, up_scales, units),
    )  # fmt: skip
    units = _units(tokens * width_out)
    launch(
        _outputs,
        tokens * triton.cdiv(width_out, units),
        *(a, index, topk_weights, down, down_bias, down_scales, y, tokens, k, width_out, hidden, *down.stride()),
        **_stored(down, down_scales, units),
    )  # fmt: skip
    return y


@_decode.register_fake
def _(
    x, index, topk_weights, up, up_bias, up_scales, down, down_bias, down_scales, hidden, act, gated, alpha, limit
):  # fmt: skip
    return x.new_empty(len(x), down.shape[1])


def _words(weight: Tensor) -> Tensor:
    """View packed int4 weights as 16-bit words; return other weights unchanged."""
    return weight.view(torch.int16) if weight.dtype == torch.uint8 else weight


def _units(outputs: int) -> int:
    """Outputs per program: the most that leave at least `PROGRAMS` programs."""
    return next((units for units in (16, 8) if outputs >= units * PROGRAMS), 4)


def _stored(weight: Tensor, scales: Tensor | None, units: int) -> dict[str, int]:
    """Kernel constants of a projection: bits (0 for floats), group size, groups per row, and tile sizes."""
    bits = {torch.int8: 8, torch.int16: 4}.get(weight.dtype, 0)
    groups = scales.shape[2] if bits == 4 and scales is not None else 1
    group = 4 * weight.shape[2] // groups if bits == 4 else 1
    return {"BITS": bits, "GROUP": group, "GROUPS": groups, "UNITS": units, "STEP": NUMBERS // units}


@triton.jit
def _hidden_units(
    x, index, weight, bias, scales, a, R, k, H, D, stride_e, stride_m, stride_d, alpha, limit,
    ACT: tl.constexpr, GATED: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, UNITS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) % R  # programs that may read the same weights are adjacent
    unit = (tl.program_id(0) // R) * UNITS + tl.arange(0, UNITS)
    there = unit < H
    expert = tl.load(index + row).to(tl.int64)
    x += (row // k) * D
    weight += expert * stride_e
    M = 2 * H if GATED else H
    first = unit * 2 if ACT == "clamped" else unit
    p = _times(
        weight, scales, expert * M + first, first, there, x, D, stride_m, stride_d, BITS, GROUP, GROUPS, UNITS, STEP
    )
    if bias is not None:
        p += tl.load(bias + expert * M + first, mask=there, other=0.0).to(tl.float32)
    p = p.to(a.dtype.element_ty).to(tl.float32)
    if GATED:
        second = first + 1 if ACT == "clamped" else first + H
        q = _times(
            weight,
            scales,
            expert * M + second,
            second,
            there,
            x,
            D,
            stride_m,
            stride_d,
            BITS,
            GROUP,
            GROUPS,
            UNITS,
            STEP,
        )
        if bias is not None:
            q += tl.load(bias + expert * M + second, mask=there, other=0.0).to(tl.float32)
        h = gated(p, q.to(a.dtype.element_ty).to(tl.float32), alpha, limit, ACT)[0]
    else:
        h = activate(p, ACT)[0]
    tl.store(a + row * H + unit, h.to(a.dtype.element_ty), mask=there)


@triton.jit
def _outputs(
    a, index, topk_weights, weight, bias, scales, y, T, k, N, H, stride_e, stride_o, stride_h,
    BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, UNITS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) % T
    unit = (tl.program_id(0) // T) * UNITS + tl.arange(0, UNITS)
    there = unit < N
    total = tl.zeros((UNITS,), tl.float32)
    for row in range(token * k, token * k + k):
        expert = tl.load(index + row).to(tl.int64)
        output = _times(
            weight + expert * stride_e, scales, expert * N + unit, unit, there, a + row * H, H, stride_o, stride_h,
            BITS, GROUP, GROUPS, UNITS, STEP,
        )  # fmt: skip
        if bias is not None:
            output += tl.load(bias + expert * N + unit, mask=there, other=0.0).to(tl.float32)
        total += tl.load(topk_weights + row).to(tl.float32) * output.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + token * N + unit, total.to(y.dtype.element_ty), mask=there)


@triton.jit
def _times(
    weight, scales, scale_of, row, there, x, K, stride_row, stride_k,
    BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, UNITS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Some rows of a matrix times a vector of K elements; `scale_of` is the index of each row in `scales`."""
    if BITS == 4:
        return _times_4(weight, scales, scale_of, row, there, x, K, stride_row, GROUP, GROUPS, UNITS, STEP // 128)
    acc = tl.zeros((UNITS, STEP), tl.float32)
    k = tl.arange(0, STEP)
    weight += (row * stride_row)[:, None] + k[None, :] * stride_k
    for begin in range(0, K, STEP):
        inside = begin + k < K
        w = tl.load(weight, mask=there[:, None] & inside[None, :], other=0).to(tl.float32)
        acc += w * tl.load(x + begin + k, mask=inside, other=0.0).to(tl.float32)[None, :]
        weight += STEP * stride_k
    y = tl.sum(acc, 1)
    if BITS == 8:
        y *= tl.load(scales + scale_of, mask=there, other=0.0)
    return y


@triton.jit
def _times_4(
    words, scales, scale_of, row, there, x, K, stride_row,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, UNITS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The same for int4: word i of a block of 128 weights holds the weights i, i + 32, i + 64 and i + 96."""
    acc = tl.zeros((UNITS, BLOCKS, 32), tl.float32)
    i = tl.arange(0, 32)
    words += (row * stride_row)[:, None, None] + i[None, None, :]
    scales += scale_of[:, None] * GROUPS
    for begin in range(0, tl.cdiv(K, 128), BLOCKS):
        block = begin + tl.arange(0, BLOCKS)
        inside = there[:, None] & (block < tl.cdiv(K, 128))[None, :]
        packed = tl.load(words + 32 * block[None, :, None], mask=inside[:, :, None], other=0).to(tl.int32)
        for j in tl.static_range(4):
            place = 128 * block[:, None] + i[None, :] + 32 * j
            scale = tl.load(scales + (128 * block + 32 * j)[None, :] // GROUP, mask=inside, other=0.0)
            number = ((packed >> (4 * j)) & 15).to(tl.float32) - 8
            v = tl.load(x + place, mask=place < K, other=0.0).to(tl.float32)
            acc += number * (scale[:, :, None] * v[None, :, :])
    return tl.sum(tl.sum(acc, 2), 1)
