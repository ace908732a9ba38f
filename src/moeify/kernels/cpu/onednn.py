"""Matrix products on a CPU by the faster of two libraries: the BLAS that torch is built with, or oneDNN.

In fp32 torch always calls its BLAS, which reaches half of the throughput of some processors; in bf16 and fp16 it calls
oneDNN itself. Both compute with full precision. A measurement at first use on a processor selects one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import torch
from jaxtyping import Float
from torch import Tensor

from moeify import env
from moeify.kernels.cpu.packing import cached
from moeify.kernels.cpu.probes import remembered, shortest

_SIZES = (1, 4, 32, 128)  # smallest dimensions of a product at which the libraries are compared
_MARGIN = 1.1  # speed-up that oneDNN needs, so that two runs on one machine rarely select differently


def multiply(left: Float[Tensor, "M K"], right: Float[Tensor, "K N"], out: Float[Tensor, "M N"]) -> None:
    """Write `left @ right` into `out`; one dtype, any strides.

    Raises:
        ValueError: `MOEIFY_FP32_GEMM` names no library.
    """
    if _by_onednn(left, right):
        out.copy_(linear(left, right.t()))
    else:
        torch.mm(left, right, out=out)


def product(left: Float[Tensor, "M K"], right: Float[Tensor, "K N"]) -> Float[Tensor, "M N"]:
    """`left @ right` in new memory; operands as of `multiply`.

    Raises:
        ValueError: `MOEIFY_FP32_GEMM` names no library.
    """
    return linear(left, right.t()) if _by_onednn(left, right) else left @ right


def _by_onednn(left: Float[Tensor, "M K"], right: Float[Tensor, "K N"]) -> bool:
    if not (left.is_cpu and left.dtype == torch.float32 and left.numel()):
        return False
    size = min(*left.shape, right.shape[1])
    return takes_onednn(size, left_transposed=left.stride(1) != 1, right_transposed=right.stride(1) != 1)


def linear(rows: Float[Tensor, "R D"], weight: Tensor) -> Float[Tensor, "R O"]:
    """`rows @ weight.T` through oneDNN, the weight (O, D) packed by `packed` or not."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")


def packed(weight: Float[Tensor, "E O D"], dtype: torch.dtype) -> Sequence[Tensor]:
    """The matrices of a stack in oneDNN's packed layout, twice as fast for few rows; a cached copy."""
    owner = weight if weight._base is None else weight._base
    made = f"onednn {dtype}, transposed: {not weight.is_contiguous()}"
    return cached(owner, made, [weight], lambda: [reorder(matrix.to(dtype)) for matrix in weight.detach()])


def reorder(matrix: Float[Tensor, "O D"]) -> Tensor:
    """A copy of one matrix in oneDNN's packed layout, for `linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), 16)


@cache
def available() -> bool:
    """Whether this build of torch has oneDNN."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN supports packed weights of a dtype on this processor."""
    return available() and bool(torch.backends.mkldnn.enabled) and dtype in _packable()


@cache
def _packable() -> list[torch.dtype]:
    ops = torch.ops.mkldnn
    halves = {torch.bfloat16: ops._is_mkldnn_bf16_supported(), torch.float16: ops._is_mkldnn_fp16_supported()}
    return [torch.float32, *(dtype for dtype, supported in halves.items() if supported)]


def takes_onednn(size: int, *, left_transposed: bool = False, right_transposed: bool = False) -> bool:
    """Whether a product in fp32 is computed by oneDNN.

    Args:
        size: the smallest dimension of the product: the rows of one expert.
        left_transposed: whether the left matrix is column-major.
        right_transposed: whether the right matrix is column-major.

    Raises:
        ValueError: `MOEIFY_FP32_GEMM` names no library.
    """
    wish = env.FP32_GEMM.value
    if wish == "blas" or not available() or not torch.backends.mkldnn.enabled:
        return False
    if wish == "onednn":
        return True
    if torch.are_deterministic_algorithms_enabled():  # another run may measure a different winner
        return False
    like = next((like for like in _SIZES if size <= 2 * like), _SIZES[-1])
    return onednn_is_faster(like, left_transposed, right_transposed, torch.get_num_threads())


def is_compiled(rows: Tensor, size: int, **transposed: bool) -> bool:
    """Whether a product of these rows is computed by oneDNN, which compiles a kernel for every shape.

    Args:
        rows: the left matrix.
        size: the smallest dimension of the product.
        transposed: as of `takes_onednn`.
    """
    if not (rows.is_cpu and available()):
        return False
    return takes_onednn(size, **transposed) if rows.dtype == torch.float32 else rows.dtype.itemsize == 2


@cache
def onednn_is_faster(size: int, left_transposed: bool, right_transposed: bool, threads: int) -> bool:
    """Whether oneDNN is faster than the BLAS in fp32 on this processor; measured once, in milliseconds.

    Args:
        size: the smallest dimension of the product: the rows of one expert.
        left_transposed: whether the left matrix is transposed, as in the gradient of a weight; size is then K, else M.
        right_transposed: whether the right matrix is transposed.
        threads: threads of torch; results are cached per number of threads.
    """
    order = f"{'K x M' if left_transposed else 'M x K'} by {'N x K' if right_transposed else 'K x N'}"
    question = f"oneDNN beats the BLAS: {size} rows, {order} in memory, {threads} threads"
    return remembered(question, lambda: _onednn_wins(size, left_transposed, right_transposed))


def _onednn_wins(size: int, left_transposed: bool, right_transposed: bool) -> bool:
    m, k = (256, size) if left_transposed else (size, 256)
    ones = partial(torch.ones, dtype=torch.float32, device="cpu")  # random values would change the RNG
    left = ones(k, m).t() if left_transposed else ones(m, k)
    right = ones(512, k).t() if right_transposed else ones(k, 512)
    out = left.new_empty(m, 512)
    blas, onednn = shortest(
        lambda: torch.mm(left, right, out=out),
        lambda: out.copy_(linear(left, right.t())),
    )
    return onednn * _MARGIN < blas
