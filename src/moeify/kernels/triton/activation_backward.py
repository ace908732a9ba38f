"""The backward pass of the down projection and the activation of an expert, fused into one kernel.

With y = W2 · A + b2 for a row, w its top-k weight and dy the gradient of the layer's output at the row's token,

    dA' = W2ᵀ · dy                          gradient of the row's activations A for weight 1
    dP  = w · dA' · activation'(P)          P is the input of the activation, A = activation(P) is recomputed
    dw  = <dy, y> = <dA', A> + <dy, b2>     so the expert outputs y are never saved (SonicMoE, arXiv 2512.14080)

Every program sums <dA', A> over its own columns; `weights` sums over the programs, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from moeify.kernels.naive import naive_grouped_linear
from moeify.kernels.stacked import Activation
from moeify.kernels.triton.activation import KernelActivation, activate, gated
from moeify.kernels.triton.config import Config
from moeify.kernels.triton.launch import arithmetic, launch, power_of_2
from moeify.kernels.triton.product import halves, multiply, place


def activation_backward(
    dy: Float[Tensor, "T O"],
    source: Int[Tensor, "R"],
    weight: Float[Tensor, "R"],
    down: Float[Tensor, "E O H"],
    before: Float[Tensor, "R M"],
    table: Int[Tensor, "3 tiles"],
    size: Config,
    activation: KernelActivation,
) -> tuple[Float[Tensor, "R M"], Float[Tensor, "R H"], Float[Tensor, "R blocks"]]:
    """The gradient dP of `before` (P), w · A for the gradient of `down`, and partial sums of <dA', A> in fp32."""
    rows, width = len(source), down.shape[2]
    size = size.within(n=width, k=dy.shape[1])
    blocks = triton.cdiv(width, size.n)
    gradient = torch.empty_like(before)
    weighted = before.new_empty(rows, width)
    parts = before.new_empty(rows, blocks, dtype=torch.float32)
    launch(
        _activation_backward,
        table.shape[1] * blocks,
        *(dy, source, weight, down, before, gradient, weighted, parts, table, table.shape[1], width, dy.shape[1]),
        *(down.stride(0), down.stride(2), down.stride(1), activation.alpha, activation.limit),
        ACT=activation.act, GATED=activation.gated, EVEN=dy.shape[1] % size.k == 0,
        BM=size.m, BN=size.n, BK=size.k, GROUP=8,
        **arithmetic(dy.dtype), num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    return gradient, weighted, parts


def weights(
    parts: Float[Tensor, "R blocks"],
    dy: Float[Tensor, "T O"],
    source: Int[Tensor, "R"],
    bias: Float[Tensor, "E O"] | None,
    table: Int[Tensor, "3 tiles"],
    block: int,
) -> Float[Tensor, "R"]:
    """The gradient of the top-k weight of each row, fp32: Σ parts + <dy, bias>."""
    out = parts.new_empty(len(parts))
    launch(
        _weights,
        table.shape[1],
        *(parts, dy, source, bias, out, table, table.shape[1], parts.shape[1], dy.shape[1]),
        BM=block, BLOCKS=power_of_2(parts.shape[1]), BK=64,
    )  # fmt: skip
    return out


def naive_activation_backward(
    dy: Float[Tensor, "T O"],
    source: Int[Tensor, "R"],
    weight: Float[Tensor, "R"],
    down: Float[Tensor, "E O H"],
    bias: Float[Tensor, "E O"] | None,
    before: Float[Tensor, "R M"],
    counts: Int[Tensor, "E"],
    activation: Activation,
) -> tuple[Float[Tensor, "R M"], Float[Tensor, "R H"], Float[Tensor, "R"]]:
    """The reference implementation by autograd: the gradients of `before` and of the top-k weights, and w · A."""
    with torch.enable_grad():
        before, weight = before.detach().requires_grad_(), weight.detach().requires_grad_()
        a = activation(before)
        y = weight.unsqueeze(1) * naive_grouped_linear(a, down, counts, bias)
        gradient, by_weight = torch.autograd.grad(y, (before, weight), dy[source])
    return gradient, (weight.unsqueeze(1) * a).detach(), by_weight


@triton.jit
def _activation_backward(
    dy, source, weight, down, before, gradient, weighted, parts, table, tiles, N, K,
    stride_e, stride_n, stride_k, alpha, limit,
    ACT: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BN)
    tile, block = place(tl.program_id(0), tiles, blocks, GROUP)
    expert = tl.load(table + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(table + tiles + tile)
    row = first + tl.arange(0, BM)
    there = row < tl.load(table + 2 * tiles + tile)
    row = tl.where(there, row, first).to(tl.int64)
    column = block * BN + tl.arange(0, BN)
    inside = column < N
    da = multiply(
        dy + tl.load(source + row) * K,
        down + expert * stride_e + column * stride_n,
        inside, K, stride_k, BM, BN, BK, EVEN, PRECISION, UPCAST,
    )  # fmt: skip
    w = tl.load(weight + row).to(tl.float32)[:, None]
    left, right = halves(da, BM, BN)
    part = _finish(left, w, 2 * block, before, gradient, weighted, row, there, N, alpha, limit, ACT, GATED, BM, BN // 2)
    part += _finish(
        right, w, 2 * block + 1, before, gradient, weighted, row, there, N, alpha, limit, ACT, GATED, BM, BN // 2
    )
    tl.store(parts + row * blocks + block, part, mask=there)


@triton.jit
def _finish(
    da, w, block, before, gradient, weighted, row, there, N, alpha, limit,
    ACT: tl.constexpr, GATED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a block of hidden units and their weighted activations, and return <dA', A>."""
    column = block * BN + tl.arange(0, BN)
    at = row[:, None] * N + column[None, :]
    mask = there[:, None] & (column < N)[None, :]
    if not GATED:
        a, slope = activate(tl.load(before + at, mask=mask, other=0.0).to(tl.float32), ACT)
        tl.store(gradient + at, (w * da * slope).to(gradient.dtype.element_ty), mask=mask)
    elif ACT == "clamped":
        both = block * 2 * BN + tl.arange(0, 2 * BN)
        at_both = row[:, None] * 2 * N + both[None, :]
        mask_both = there[:, None] & (both < 2 * N)[None, :]
        pair = tl.load(before + at_both, mask=mask_both, other=0.0)
        gate, up = tl.split(tl.reshape(pair, (BM, BN, 2)))
        a, by_gate, by_up = gated(gate.to(tl.float32), up.to(tl.float32), alpha, limit, ACT)
        by_gate = (w * da * by_gate).to(gradient.dtype.element_ty)
        by_up = (w * da * by_up).to(gradient.dtype.element_ty)
        tl.store(gradient + at_both, tl.reshape(tl.join(by_gate, by_up), (BM, 2 * BN)), mask=mask_both)
    else:
        at_gate = row[:, None] * 2 * N + column[None, :]
        gate = tl.load(before + at_gate, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(before + at_gate + N, mask=mask, other=0.0).to(tl.float32)
        a, by_gate, by_up = gated(gate, up, alpha, limit, ACT)
        tl.store(gradient + at_gate, (w * da * by_gate).to(gradient.dtype.element_ty), mask=mask)
        tl.store(gradient + at_gate + N, (w * da * by_up).to(gradient.dtype.element_ty), mask=mask)
    tl.store(weighted + at, (w * a).to(weighted.dtype.element_ty), mask=mask)
    return tl.sum(tl.where(mask, da * a, 0.0), 1)


@triton.jit
def _weights(
    parts, dy, source, bias, out, table, tiles, blocks, K, BM: tl.constexpr, BLOCKS: tl.constexpr, BK: tl.constexpr
):
    tile = tl.program_id(0)
    expert = tl.load(table + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(table + tiles + tile)
    row = first + tl.arange(0, BM)
    there = row < tl.load(table + 2 * tiles + tile)
    row = tl.where(there, row, first).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    total = tl.sum(
        tl.load(parts + row[:, None] * blocks + block[None, :], mask=(block < blocks)[None, :], other=0.0), 1
    )
    if bias is not None:
        at = dy + tl.load(source + row) * K
        for begin in range(0, K, BK):
            k = begin + tl.arange(0, BK)
            g = tl.load(at[:, None] + k[None, :], mask=(k < K)[None, :], other=0.0).to(tl.float32)
            b = tl.load(bias + expert * K + k, mask=k < K, other=0.0).to(tl.float32)
            total += tl.sum(g * b[None, :], 1)
    tl.store(out + row, total, mask=there)
