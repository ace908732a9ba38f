"""Rows per expert up to which the C++ kernel is faster than a library's products, measured on this processor."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor

from moeify.kernels.constant import constant_result
from moeify.kernels.cpu import cpp
from moeify.kernels.cpu.cpp.build import level
from moeify.kernels.cpu.cpp.compiler import name
from moeify.kernels.cpu.cpp.products import multiply_runs, multiply_runs_tn
from moeify.kernels.cpu.onednn import multiply
from moeify.kernels.cpu.probes import remembered, shortest

COUNTS = (2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 1024)
"""Rows per expert at which the two are compared, until the kernel is behind."""
ANY = sys.maxsize
"""The answer where the kernel wins at all of them, as in bf16 on a processor whose libraries lack it."""
WITHOUT_CLOCK = 64
"""The answer where results must repeat on any machine; the kernel computes any number of rows."""

_WIDTH, _HIDDEN = 512, 1024
_ROWS = 256  # of all experts of a comparison, which are eight at most
_MARGIN = 1.05  # by which the kernel may be behind: it needs nothing compiled for a new number of rows


@constant_result
def max_rows(layout: str, dtype: torch.dtype) -> int:
    """Rows per expert up to which the C++ kernel is used; measured once per processor, in less than a second.

    Args:
        layout: "nt" for rows by transposed weights, "nn" for rows by weights, "tn" for sums of outer products.
        dtype: dtype of the rows.

    Returns:
        One of `COUNTS` or `ANY`; 0 where the kernel is unavailable, lacks the dtype or is always behind.
    """
    if dtype not in (torch.float32, torch.bfloat16) or cpp.why_not() is not None:
        return 0
    if torch.are_deterministic_algorithms_enabled():
        return WITHOUT_CLOCK
    return _measured(layout, dtype, level(), torch.get_num_threads())


@cache
def _measured(layout: str, dtype: torch.dtype, level: str, threads: int) -> int:
    question = f"rows per expert up to which {name(level)} beats a library: {layout}, {dtype}, {threads} threads"
    return remembered(question, lambda: last_win(partial(_compare, layout, dtype), COUNTS))


def last_win(compare: Callable[[int], list[float]], counts: Sequence[int]) -> int:
    """The last count before the first at which the kernel is behind; 0 if it is behind at once, `ANY` if never.

    Args:
        compare: the times of the kernel and of the library for a number of rows per expert.
        counts: these numbers.
    """
    most = 0
    for count in counts:
        kernel, library = compare(count)
        if kernel > _MARGIN * library:
            return most
        most = count
    return ANY


def _compare(layout: str, dtype: torch.dtype, count: int) -> list[float]:
    _, kernel, library = ways(layout, dtype, count)
    return shortest(kernel, library, rounds=5)


def ways(layout: str, dtype: torch.dtype, count: int) -> tuple[Tensor, Callable[[], object], Callable[[], object]]:
    """The product by the kernel and by the library, for `count` rows of each of some experts.

    All operands are ones: random values would move the state of the random generator.

    Args:
        layout: as of `max_rows`.
        dtype: dtype of rows and weights.
        count: rows per expert.

    Returns:
        The tensor into which both write, the kernel, and the library.
    """
    experts = min(8, max(1, _ROWS // count))
    runs = [(expert, expert * count, (expert + 1) * count) for expert in range(experts)]
    weight = torch.ones(experts, _HIDDEN, _WIDTH, dtype=dtype)
    if layout == "nn":
        weight = weight.transpose(1, 2)
    rows, out = (torch.ones(experts * count, width, dtype=dtype) for width in (weight.shape[2], weight.shape[1]))
    parts = list(zip(rows.split(count), out.split(count), weight, strict=True))
    if layout == "tn":
        kernel = partial(multiply_runs_tn, out, rows, weight, runs, add=False)
        return weight, kernel, lambda: [multiply(b.t(), a, into) for a, b, into in parts]
    kernel = partial(multiply_runs, rows, weight, runs, out=out)
    return out, kernel, lambda: [multiply(a, matrix.t(), b) for a, b, matrix in parts]
