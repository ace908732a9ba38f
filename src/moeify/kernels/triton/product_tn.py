"""Grouped GEMM (TN) in Triton: weight gradients as sums of outer products over the rows of each expert."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from moeify.kernels.triton.config import Config
from moeify.kernels.triton.launch import arithmetic, launch, power_of_2


def product_tn(
    left: Float[Tensor, "L M"],
    left_source: Int[Tensor, "R"] | None,
    right: Float[Tensor, "N D"],
    right_source: Int[Tensor, "R"] | None,
    counts: Int[Tensor, "E"],
    like: Float[Tensor, "E M D"],
    size: Config,
) -> Float[Tensor, "E M D"]:
    """Σ left[r] ⊗ right[r] over the rows r of each expert, with the strides of `like`.

    Args:
        left: rows, or the tensor from which `left_source` gathers rows.
        left_source: the index of each row in `left`.
        right: rows, or the tensor from which `right_source` gathers rows.
        right_source: the index of each row in `right`.
        counts: rows of each expert; the result for an expert without rows is zero.
        like: the weight.
        size: tile sizes: m and n of the result, k rows per step.
    """
    experts, m, n = like.shape
    size = size.within(m=m, n=n)
    out = torch.empty_like(like)
    launch(
        _product_tn,
        experts * triton.cdiv(m, size.m) * triton.cdiv(n, size.n),
        *(left, left_source, right, right_source, counts, out, m, n, *out.stride()),
        EXPERTS=power_of_2(experts), BM=size.m, BN=size.n, BK=size.k,
        **arithmetic(left.dtype), num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    return out


def column_sums(
    rows: Float[Tensor, "L M"],
    source: Int[Tensor, "R"] | None,
    weight: Float[Tensor, "R"] | None,
    counts: Int[Tensor, "E"],
) -> Float[Tensor, "E M"]:
    """Σ weight[r] · rows[r] over the rows r of each expert: the gradient of a bias.

    It is a separate kernel, because computing the sum in `product_tn` would require its left operand in registers.
    """
    experts, m = len(counts), rows.shape[1]
    out = rows.new_empty(experts, m)
    launch(
        _column_sums,
        experts * triton.cdiv(m, 64),
        *(rows, source, weight, counts, out, m),
        EXPERTS=power_of_2(experts), BM=64, BK=64,
    )  # fmt: skip
    return out


def naive_product_tn(
    left: Float[Tensor, "R M"], right: Float[Tensor, "R D"], counts: Int[Tensor, "E"]
) -> Float[Tensor, "E M D"]:
    """The reference implementation of `product_tn`, for gathered rows."""
    sizes = counts.tolist()
    return torch.stack([a.t() @ b for a, b in zip(left.split(sizes), right.split(sizes), strict=True)])


def naive_column_sums(
    rows: Float[Tensor, "R M"], weight: Float[Tensor, "R"] | None, counts: Int[Tensor, "E"]
) -> Float[Tensor, "E M"]:
    """The reference implementation of `column_sums`, for gathered rows."""
    weighted = rows if weight is None else weight.unsqueeze(1) * rows
    return torch.stack([part.sum(0) for part in weighted.split(counts.tolist())])


@triton.jit
def _product_tn(
    left, left_source, right, right_source, counts, out, M, N, stride_e, stride_m, stride_n,
    EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BN)
    per_expert = tl.cdiv(M, BM) * blocks
    expert = tl.program_id(0) // per_expert
    within = tl.program_id(0) % per_expert
    first, end = rows_of(expert, counts, EXPERTS)
    m = (within // blocks) * BM + tl.arange(0, BM)
    n = (within % blocks) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for begin in range(first, end, BK):
        row = begin + tl.arange(0, BK)
        there = row < end
        row = tl.where(there, row, first).to(tl.int64)
        at_left = row if left_source is None else tl.load(left_source + row)
        at_right = row if right_source is None else tl.load(right_source + row)
        a = tl.load(left + at_left[:, None] * M + m[None, :], mask=there[:, None] & (m < M)[None, :], other=0.0)
        b = tl.load(right + at_right[:, None] * N + n[None, :], mask=there[:, None] & (n < N)[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    at = expert.to(tl.int64) * stride_e + m[:, None] * stride_m + n[None, :] * stride_n
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _column_sums(
    rows, source, weight, counts, out, M, EXPERTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(M, BM)
    expert = tl.program_id(0) // blocks
    m = (tl.program_id(0) % blocks) * BM + tl.arange(0, BM)
    first, end = rows_of(expert, counts, EXPERTS)
    total = tl.zeros((BM,), tl.float32)
    for begin in range(first, end, BK):
        row = begin + tl.arange(0, BK)
        there = row < end
        at = (row.to(tl.int64) if source is None else tl.load(source + row, mask=there, other=0))[:, None] * M
        x = tl.load(rows + at + m[None, :], mask=there[:, None] & (m < M)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(
            x if weight is None else x * tl.load(weight + row, mask=there, other=0.0).to(tl.float32)[:, None], 0
        )
    tl.store(out + expert.to(tl.int64) * M + m, total.to(out.dtype.element_ty), mask=m < M)


@triton.jit
def rows_of(expert, counts, EXPERTS: tl.constexpr) -> tuple[Any, Any]:
    """The first row of an expert, and the row after its last."""
    e = tl.arange(0, EXPERTS)
    first = tl.sum(tl.load(counts + e, mask=e < expert, other=0).to(tl.int32), 0)
    return first, first + tl.load(counts + expert).to(tl.int32)
