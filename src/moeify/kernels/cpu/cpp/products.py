"""Grouped GEMMs (NT, NN and TN) in C++, for few rows per expert: each matrix is read or written once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.kernels.cpu.cpp.build import library

Run = tuple[int, int, int]  # an expert, its first row, and the row after its last
_LAYOUTS = ["nt", "nn", "tn"]


class _Products(ctypes.Structure):
    _fields_ = (
        ("left", c_void_p), ("right", c_void_p), ("out", c_void_p), ("left_stride", c_int64), ("right_stride", c_int64),
        ("weight", c_void_p), ("expert_stride", c_int64), ("row_stride", c_int64),
        ("height", c_int64), ("width", c_int64), ("runs", c_void_p), ("count", c_int64),
        ("layout", c_int32), ("is_bf16", c_int32), ("adds", c_int32), ("threads", c_int32),
    )  # fmt: skip


def multiply_runs(
    rows: Float[Tensor, "B D"],
    weight: Float[Tensor, "E O D"],
    runs: Sequence[Run],
    *,
    start: int | None = None,
    out: Float[Tensor, "B O"] | None = None,
) -> Float[Tensor, "B O"]:
    """Every row times the transposed matrix of its expert.

    Args:
        rows: contiguous rows, in fp32 or bf16.
        weight: in the dtype of the rows; O or D has stride one.
        runs: the rows of each expert; outputs of other rows are left as they are.
        start: the number that `runs` give the first of `rows`; by default the first row of the first run.
        out: contiguous memory for the outputs, in the dtype of the rows; new memory by default.

    Raises:
        Unavailable: the C++ kernels are not available.
    """
    out = rows.new_empty(len(rows), weight.shape[1]) if out is None else out
    start = runs[0][1] if start is None else start
    if weight.stride(2) == 1:
        _call("nt", rows, None, out, weight, runs, start)
    else:
        _call("nn", rows, None, out, weight.transpose(1, 2), runs, start)
    return out


def multiply_runs_tn(
    left: Float[Tensor, "B O"],
    right: Float[Tensor, "B D"],
    into: Float[Tensor, "E O D"],
    runs: Sequence[Run],
    *,
    add: bool,
    start: int | None = None,
) -> None:
    """Write the sum of outer products of each expert's rows to its matrix, or accumulate it.

    Args:
        left: contiguous rows, in fp32 or bf16.
        right: contiguous rows, in the same dtype.
        into: in the dtype of the rows; O or D has stride one.
        runs: the rows of each expert; matrices of other experts are left as they are.
        add: accumulate into the matrices instead of overwriting them.
        start: the number that `runs` give the first of the rows; by default the first row of the first run.

    Raises:
        Unavailable: the C++ kernels are not available.
    """
    start = runs[0][1] if start is None else start
    if into.stride(2) == 1:
        _call("tn", left, right, None, into, runs, start, add)
    else:
        _call("tn", right, left, None, into.transpose(1, 2), runs, start, add)


def _call(
    layout: str,
    left: Tensor,
    right: Tensor | None,
    out: Tensor | None,
    weight: Tensor,
    runs: Sequence[Run],
    start: int,
    add: bool = False,
) -> None:
    flat = [number for expert, first, last in runs for number in (expert, first - start, last - first)]
    numbers = (c_int64 * len(flat))(*flat)
    call = _Products(
        left.data_ptr(), None if right is None else right.data_ptr(), None if out is None else out.data_ptr(),
        left.stride(0), 0 if right is None else right.stride(0),
        weight.data_ptr(), weight.stride(0), weight.stride(1),
        weight.shape[1], weight.shape[2], ctypes.addressof(numbers), len(runs),
        _LAYOUTS.index(layout), weight.dtype == torch.bfloat16, add, torch.get_num_threads(),
    )  # fmt: skip
    library().moeify_products(ctypes.byref(call))
