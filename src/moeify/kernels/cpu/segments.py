"""Grouped GEMMs of rows sorted by expert on a CPU: NT and NN with every expert's matrix, TN for its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moeify.kernels.cpu import cpp
from moeify.kernels.cpu.cpp.products import Run, max_rows, multiply_runs, multiply_runs_tn
from moeify.kernels.cpu.onednn import linear, multiply, product, takes_onednn

Matrices = Tensor | Sequence[Tensor]  # (E, O, D), or E packed matrices
Block = list[Run]  # adjacent runs of rows, sorted by expert

WORTH_COMPILING = 2**18
"""Number of weights of a stacked projection from which on the C++ kernels are compiled and used."""


def blocks(counts: Sequence[int], most: int | None = None, *, whole: bool = True) -> Iterator[Block]:
    """Split all rows into blocks of at most `most` rows; experts without rows are skipped.

    Args:
        counts: rows of each expert.
        most: rows of a block; None for one block.
        whole: keep the rows of an expert in one block, even if they exceed `most`, instead of splitting them evenly.
    """
    most = most or sum(counts)
    block: Block = []
    for run in _runs(counts, sum(counts) if whole else most):
        if block and run[2] - block[0][1] > most:
            yield block
            block = []
        block.append(run)
    if block:
        yield block


def _runs(counts: Sequence[int], most: int) -> Iterator[Run]:
    first = 0
    for expert, count in enumerate(counts):
        parts = -(-count // most) if count else 0
        for part in range(parts):
            yield expert, first + count * part // parts, first + count * (part + 1) // parts
        first += count


def span(block: Block) -> slice:
    """The rows of a block."""
    return slice(block[0][1], block[-1][2])


def multiply_rows(
    rows: Float[Tensor, "B D"], weight: Matrices, bias: Float[Tensor, "E O"] | None, block: Block
) -> Float[Tensor, "B O"]:
    """Every row times the transposed matrix of its expert, plus its bias; in the dtype of the rows.

    Args:
        rows: the rows of the block.
        weight: the matrices of all experts, of any dtype; those of experts with rows are cast one at a time.
        bias: the biases of all experts.
        block: the rows of each expert.
    """
    layout = "nt" if isinstance(weight, Tensor) and weight.stride(2) == 1 else "nn"
    if isinstance(weight, Tensor) and _fit_cpp(rows, weight, block, layout):
        out = multiply_runs(rows, weight, block)
    elif rows.is_cpu and isinstance(weight, Tensor) and group_obstacle(rows, weight, len(rows) // len(block)) is None:
        out = _in_one_call(rows, weight, block)
    elif len(block) == 1:
        matrix = weight[block[0][0]]
        out = linear(rows, matrix) if matrix.is_mkldnn else product(rows, matrix.to(rows.dtype).t())
    else:
        out = rows.new_empty(len(rows), weight[0].shape[0])
        for expert, part, output in _by_expert(block, rows, out):
            matrix = weight[expert]
            if matrix.is_mkldnn:
                output.copy_(linear(part, matrix))
            else:
                multiply(part, matrix.to(rows.dtype).t(), output)
    if bias is not None:
        for expert, output in _by_expert(block, out):
            output.add_(bias[expert])
    return out


def multiply_rows_tn(
    left: Float[Tensor, "B O"],
    right: Float[Tensor, "B D"],
    into: Float[Tensor, "E O D"],
    block: Block,
    *,
    add: bool = False,
) -> None:
    """Write the sum of outer products of each expert's rows to its matrix, or accumulate it.

    Args:
        left: the left operands, the rows of the block.
        right: the right operands, the rows of the block.
        into: the matrices of all experts, of any dtype.
        block: the rows of each expert.
        add: accumulate into the matrices instead of overwriting them.
    """
    if _fit_cpp(left, into, block, "tn") and right.stride(-1) == 1:
        multiply_runs_tn(left, right, into, block, add=add)
        return
    for expert, a, b in _by_expert(block, left, right):
        if into.dtype != left.dtype or add:
            product = a.t() @ b
            into[expert].add_(product) if add else into[expert].copy_(product)
        else:
            multiply(a.t(), b, into[expert])


def _fit_cpp(rows: Float[Tensor, "B D"], weight: Float[Tensor, "E O D"], block: Block, layout: str) -> bool:
    """Whether the C++ kernel is available, supports the tensors, and is fastest for this number of rows."""
    return (
        weight.is_cpu
        and weight.numel() >= WORTH_COMPILING
        and rows.dtype == weight.dtype
        and rows.dtype in (torch.float32, torch.bfloat16)
        and rows.stride(-1) == 1
        and 1 in weight.stride()[1:]
        and cpp.why_not() is None
        and len(rows) <= max_rows(layout, rows.dtype) * len(block)
    )


def group_obstacle(rows: Float[Tensor, "B D"], weight: Float[Tensor, "E O D"], rows_each: int) -> str | None:
    """The reason why `torch.nn.functional.grouped_mm` is not used on a CPU, None if it is."""
    if rows.dtype != weight.dtype or rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "grouped_mm wants one dtype of fp32, bf16 and fp16"
    if not (_aligned(rows) and _aligned(weight) and weight.shape[1] * weight.element_size() % 16 == 0):
        return "grouped_mm wants rows aligned to 16 bytes"
    if rows.dtype == torch.float32 and takes_onednn(rows_each, right_transposed=weight.stride(2) == 1):
        return "oneDNN is faster here in fp32"
    return None


def _aligned(stack: Tensor) -> bool:
    one, other = stack.stride()[-2:]
    return min(one, other) == 1 and max(one, other) * stack.element_size() % 16 == 0 and stack.data_ptr() % 16 == 0


def _in_one_call(rows: Float[Tensor, "B D"], weight: Float[Tensor, "E O D"], block: Block) -> Float[Tensor, "B O"]:
    low, high = block[0][0], block[-1][0] + 1
    ends = [0] * (high - low)
    for expert, _, last in block:
        ends[expert - low] = last - block[0][1]
    offsets = torch.tensor(list(accumulate(ends, max)), dtype=torch.int32)  # no rows: ends where it begins
    return F.grouped_mm(rows, weight[low:high].transpose(1, 2), offs=offsets)


def _by_expert(block: Block, *rows: Tensor) -> Iterator[tuple[Any, ...]]:
    """Iterate over the experts of a block, each with its slice of every tensor in `rows`."""
    sizes = [last - first for _, first, last in block]
    return zip((run[0] for run in block), *(tensor.split(sizes) for tensor in rows), strict=True)
