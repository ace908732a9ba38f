"""Combine in Triton: the weighted sum of every token's expert outputs, gathered per token, so without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from moeify.kernels.triton.launch import launch, power_of_2


def combine(
    rows: Float[Tensor, "R O"],
    weight: Float[Tensor, "R"] | None,
    order: Int[Tensor, "V"],
    begin: Int[Tensor, "T+1"],
) -> Float[Tensor, "T O"]:
    """Σ weight[r] · rows[r] over the rows r of each token, in fp32 and always in the same order.

    Args:
        rows: expert outputs.
        weight: top-k weight of each row, 1 if None.
        order: row indices sorted by token; -1 marks a dropped or padding row.
        begin: offsets of each token's rows in `order`, and V.
    """
    tokens, width = len(begin) - 1, rows.shape[1]
    block = min(power_of_2(width), 2048 // rows.element_size())  # 16 bytes of a row for each of 128 threads
    out = rows.new_empty(tokens, width)
    blocks = triton.cdiv(width, block)
    launch(_combine, tokens * blocks, rows, weight, order, begin, out, width, blocks, BLOCK=block, ROWS=4)
    return out


def naive_combine(
    rows: Float[Tensor, "R O"],
    weight: Float[Tensor, "R"] | None,
    order: Int[Tensor, "V"],
    begin: Int[Tensor, "T+1"],
) -> Float[Tensor, "T O"]:
    """The reference implementation of `combine`."""
    weighted = rows.float() if weight is None else rows.float() * weight.float().unsqueeze(1)
    pairs = [part[part >= 0] for part in order.tensor_split(begin[1:-1].cpu())]
    return torch.stack([weighted[part].sum(0) for part in pairs]).to(rows.dtype)


@triton.jit
def _combine(rows, weight, order, begin, out, N, blocks, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    end = tl.load(begin + token + 1)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.load(begin + token), end, ROWS):
        pair = first + tl.arange(0, ROWS)
        row = tl.load(order + pair, mask=pair < end, other=-1)
        there = row >= 0
        y = tl.load(rows + row[:, None] * N + column[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        if weight is None:
            acc += tl.sum(y.to(tl.float32), 0)
        else:
            w = tl.load(weight + row, mask=there, other=0.0).to(tl.float32)
            acc += tl.sum(y.to(tl.float32) * w[:, None], 0)
    tl.store(out + token * N + column, acc.to(out.dtype.element_ty), mask=inside)
