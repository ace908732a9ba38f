"""Grouped GEMM (NT, NN) in Triton: rows times the weight of their expert, fused with gather and activation."""

from __future__ import annotations

import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from moeify.kernels.naive import naive_grouped_linear
from moeify.kernels.stacked import Activation
from moeify.kernels.triton.activation import KernelActivation, activate, gated
from moeify.kernels.triton.config import Config
from moeify.kernels.triton.launch import arithmetic, launch


def product(
    x: Float[Tensor, "T D"],
    source: Int[Tensor, "R"] | None,
    weight: Float[Tensor, "E M D"],
    bias: Float[Tensor, "E M"] | None,
    table: Int[Tensor, "3 tiles"],
    rows: int,
    size: Config,
    activation: KernelActivation | None = None,
    *,
    keep: bool = False,
) -> tuple[Float[Tensor, "R O"], Float[Tensor, "R M"] | None]:
    """`activation(weight[e] · x[source[r]] + bias[e])` for every row r of expert e, and the same before `activation`.

    Args:
        x: tokens, or rows.
        source: the token that each row reads; None if x is gathered already.
        weight: one matrix per expert, of any strides.
        bias: one vector per expert.
        table: `tile_table` for tiles of `size.m` rows.
        rows: R.
        size: tile sizes.
        activation: the activation, if any.
        keep: also return the input of `activation`, else None.
    """
    columns, depth = weight.shape[1:]
    size = size.within(n=columns, k=depth)
    width = columns // 2 if activation is not None and activation.gated else columns
    out = x.new_empty(rows, width)
    before = x.new_empty(rows, columns) if keep else None
    blocks = triton.cdiv(columns, size.n)
    launch(
        _product,
        table.shape[1] * blocks,
        *(x, source, weight, bias, before, out, table, table.shape[1], columns, depth, *weight.stride()),
        *(0.0, 0.0) if activation is None else (activation.alpha, activation.limit),
        ACT="none" if activation is None else activation.act,
        GATED=activation is not None and activation.gated,
        EVEN=depth % size.k == 0,
        BM=size.m, BN=size.n, BK=size.k, GROUP=8,
        **arithmetic(x.dtype), num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    return out, before


def naive_product(
    x: Float[Tensor, "T D"],
    source: Int[Tensor, "R"] | None,
    weight: Float[Tensor, "E M D"],
    bias: Float[Tensor, "E M"] | None,
    counts: Int[Tensor, "E"],
    activation: Activation | None = None,
) -> tuple[Float[Tensor, "R O"], Float[Tensor, "R M"]]:
    """The reference implementation of `product`."""
    before = naive_grouped_linear(x if source is None else x[source], weight, counts, bias)
    return before if activation is None else activation(before), before


@triton.jit
def _product(
    x, source, weight, bias, before, out, table, tiles, N, K, stride_e, stride_n, stride_k, alpha, limit,
    ACT: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    tile, block = place(tl.program_id(0), tiles, tl.cdiv(N, BN), GROUP)
    expert = tl.load(table + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(table + tiles + tile)
    row = first + tl.arange(0, BM)
    there = row < tl.load(table + 2 * tiles + tile)
    row = tl.where(there, row, first).to(tl.int64)
    column, inside = columns_of(block, N, BN, GATED and ACT != "clamped")
    acc = multiply(
        x + (row if source is None else tl.load(source + row)) * K,
        weight + expert * stride_e + column * stride_n,
        inside, K, stride_k, BM, BN, BK, EVEN, PRECISION, UPCAST,
    )  # fmt: skip
    if bias is not None:
        acc += tl.load(bias + expert * N + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    left, right = halves(acc, BM, BN)
    for i in tl.static_range(2):  # the epilogue processes a quarter of the tile at a time, to save registers
        a, b = halves(left if i == 0 else right, BM, BN // 2)
        at = 4 * block + 2 * i
        _finish(a, at, before, out, row, there, N, alpha, limit, ACT, GATED, BM, BN // 4)
        _finish(b, at + 1, before, out, row, there, N, alpha, limit, ACT, GATED, BM, BN // 4)


@triton.jit
def _finish(
    acc, block, before, out, row, there, N, alpha, limit,
    ACT: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store a block of columns and its activation; the activation is applied to the rounded values that are stored."""
    y = acc.to(out.dtype.element_ty)
    column = block * BN + tl.arange(0, BN)
    mask = there[:, None] & (column < N)[None, :]
    if not GATED:
        at = row[:, None] * N + column[None, :]
        if before is not None:
            tl.store(before + at, y, mask=mask)
        if ACT != "none":
            y = activate(y.to(tl.float32), ACT)[0].to(out.dtype.element_ty)
        tl.store(out + at, y, mask=mask)
    else:
        gate, up = tl.split(tl.reshape(y, (BM, BN // 2, 2)))
        hidden = block * (BN // 2) + tl.arange(0, BN // 2)
        mask_hidden = there[:, None] & (hidden < N // 2)[None, :]
        if before is not None and ACT == "clamped":
            tl.store(before + row[:, None] * N + column[None, :], y, mask=mask)
        elif before is not None:
            at = before + row[:, None] * N + hidden[None, :]
            tl.store(at, gate, mask=mask_hidden)
            tl.store(at + N // 2, up, mask=mask_hidden)
        a = gated(gate.to(tl.float32), up.to(tl.float32), alpha, limit, ACT)[0]
        tl.store(out + row[:, None] * (N // 2) + hidden[None, :], a.to(out.dtype.element_ty), mask=mask_hidden)


@triton.jit
def halves(acc, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def place(program, tiles, blocks, GROUP: tl.constexpr):
    """The tile and block of columns of a program, in groups of GROUP tiles, so that operands stay in the L2 cache."""
    group = program // (GROUP * blocks)
    size = tl.minimum(tiles - group * GROUP, GROUP)
    within = program % (GROUP * blocks)
    return group * GROUP + within % size, within // size


@triton.jit
def columns_of(block, N, BN: tl.constexpr, HALVES: tl.constexpr):
    """Columns of a block, and a mask of those below N; HALVES interleaves gate and up columns, stored N / 2 apart."""
    j = block * BN + tl.arange(0, BN)
    column = j
    if HALVES:
        column = j // 2 + (j % 2) * (N // 2)
    return column, j < N


@triton.jit
def multiply(
    a, b, inside, K, stride_k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Σ_k a[m][k] · b[n][k · stride_k]; a and b are pointers to the first element of rows and columns. EVEN: BK | K."""
    k = tl.arange(0, BK)
    a = a[:, None] + k[None, :]
    b = b[None, :] + k[:, None] * stride_k
    acc = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, K, BK):
        if EVEN:
            left = tl.load(a)
            right = tl.load(b, mask=inside[None, :], other=0.0)
        else:
            left = tl.load(a, mask=(begin + k < K)[None, :], other=0.0)
            right = tl.load(b, mask=inside[None, :] & (begin + k < K)[:, None], other=0.0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        a += BK
        b += BK * stride_k
    return acc
