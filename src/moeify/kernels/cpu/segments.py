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
from moeify.kernels.cpu.cpp.products import Run, multiply_runs, multiply_runs_tn
from moeify.kernels.cpu.crossover import max_rows
from moeify.kernels.cpu.onednn import is_compiled, linear, multiply, product, takes_onednn

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
    few, many = _by_kernel(block, _most_rows(rows, weight, layout), rows, right_transposed=layout == "nt")
    if isinstance(weight, Tensor) and not many:
        out = multiply_runs(rows, weight, few)
    elif rows.is_cpu and isinstance(weight, Tensor) and group_obstacle(rows, weight, len(rows) // len(block)) is None:
        out = _in_one_call(rows, weight, block)
    elif many == block and len(block) == 1:
        matrix = weight[block[0][0]]
        out = linear(rows, matrix) if matrix.is_mkldnn else product(rows, matrix.to(rows.dtype).t())
    else:
        out = rows.new_empty(len(rows), weight[0].shape[0])
        for expert, part, output in _by_run(block, many, rows, out):
            matrix = weight[expert]
            if matrix.is_mkldnn:  # a transposed one would be copied
                output.copy_(linear(part, matrix))
            else:
                multiply(part, matrix.to(rows.dtype).t(), output)
        if few and isinstance(weight, Tensor):
            multiply_runs(rows, weight, few, start=block[0][1], out=out)
    if bias is not None:
        for expert, output in _by_run(block, block, out):
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
    most = _most_rows(left, into, "tn") if right.stride(-1) == 1 else 0
    few, many = _by_kernel(block, most, left, left_transposed=True)
    begun: set[int] = set()  # experts of which some rows are summed up
    for expert, a, b in _by_run(block, many, left, right):
        if add or expert in begun:
            into[expert].add_(product(a.t(), b))
        elif into.dtype != left.dtype:
            into[expert].copy_(product(a.t(), b))
        else:
            multiply(a.t(), b, into[expert])
        begun.add(expert)
    for adds in (False, True):
        if runs := [run for run in few if (add or run[0] in begun) == adds]:
            multiply_runs_tn(left, right, into, runs, start=block[0][1], add=adds)


def _by_kernel(block: Block, most: int, rows: Float[Tensor, "B _"], **transposed: bool) -> tuple[Block, Block]:
    """The runs of at most so many rows, for the C++ kernel, and the others, for a library.

    oneDNN compiles a kernel for every number of rows that it has not seen, which takes as long as hundreds of rows do,
    and an expert rarely has the same number twice. So it gets most of an expert's rows, in a number that repeats.
    """
    few, many = [], []
    for expert, first, last in block:
        count = last - first
        splits = most < count and is_compiled(rows, count, **transposed)
        rest = first if count <= most else last - count % _step(count) if splits else last
        if rest > first:
            many.append((expert, first, rest))
        if last > rest:
            (few if last - rest <= most else many).append((expert, rest, last))
    return few, many


def _step(count: int) -> int:
    """A number of rows: 64, or between a sixteenth and an eighth of many rows."""
    return max(64, 1 << max(0, count.bit_length() - 4))


def _most_rows(rows: Float[Tensor, "B D"], weight: Matrices, layout: str) -> int:
    """Rows of an expert up to which the C++ kernel is fastest; 0 where it is unavailable or lacks these tensors."""
    fits = (
        isinstance(weight, Tensor)
        and weight.is_cpu
        and weight.numel() >= WORTH_COMPILING
        and rows.dtype == weight.dtype
        and rows.dtype in (torch.float32, torch.bfloat16)
        and rows.stride(-1) == 1
        and 1 in weight.stride()[1:]
        and cpp.why_not() is None
    )
    return max_rows(layout, rows.dtype) if fits else 0


def group_obstacle(rows: Float[Tensor, "B D"], weight: Float[Tensor, "E O D"], rows_each: int) -> str | None:
    """The reason why `torch.nn.functional.grouped_mm` is not used on a CPU, None if it is."""
    if rows.dtype != torch.float32 or weight.dtype != torch.float32:
        return "grouped_mm wants fp32"  # in 16 bits it calls oneDNN, which compiles a kernel for each number of rows
    if not (_aligned(rows) and _aligned(weight) and weight.shape[1] * weight.element_size() % 16 == 0):
        return "grouped_mm wants rows aligned to 16 bytes"
    if takes_onednn(rows_each, right_transposed=weight.stride(2) == 1):
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


def _by_run(block: Block, runs: Block, *rows: Tensor) -> Iterator[tuple[Any, ...]]:
    """Iterate over runs of a block, each with its expert and its slice of every tensor of `rows`."""
    start = block[0][1]
    for expert, first, last in runs:
        yield expert, *(tensor[first - start : last - start] for tensor in rows)
