"""Rows per expert up to which the fused C++ layer is faster than blocks of products, measured on this processor.

Products alone do not tell: the fused layer gathers, activates and adds without buffers, and prefetches its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import cycle

import torch
from torch import Tensor
from torch.nn import functional as F

from moeify.kernels.constant import constant_result
from moeify.kernels.cpu import cpp
from moeify.kernels.cpu.cpp.build import level
from moeify.kernels.cpu.cpp.compiler import name
from moeify.kernels.cpu.crossover import WITHOUT_CLOCK, last_win, max_rows
from moeify.kernels.cpu.layer import infer_layer
from moeify.kernels.cpu.onednn import can_pack, reorder
from moeify.kernels.cpu.probes import remembered, shortest
from moeify.kernels.stacked import Glu, Stacked

COUNTS = (2, 8, 16, 32, 64, 128, 256, 512)
"""Rows per expert at which the two are compared, until the fused layer is behind."""
_WIDTH, _HIDDEN, _EXPERTS = 512, 1024, 8
_ROWS = 256  # of all experts of a comparison
_DTYPES = (torch.float32, torch.bfloat16)


@constant_result
def max_layer_rows(dtype: torch.dtype, *, packs: bool = False) -> int:
    """Rows per expert up to which the fused layer is used; measured once per processor, in a second or two.

    Args:
        dtype: dtype of the rows.
        packs: whether the blocks may keep packed copies of the weights.

    Returns:
        One of `COUNTS` or `crossover.ANY`; 0 where the kernel is unavailable, lacks the dtype or is always behind.
    """
    if dtype not in _DTYPES or cpp.why_not() is not None:
        return 0
    if torch.are_deterministic_algorithms_enabled():
        return WITHOUT_CLOCK
    return _measured(dtype, packs and can_pack(dtype), level(), torch.get_num_threads())


@cache
def _measured(dtype: torch.dtype, packs: bool, level: str, threads: int) -> int:
    beside = "blocks of packed weights" if packs else "blocks"
    question = f"rows per expert up to which {name(level)} beats {beside}: layer, {dtype}, {threads} threads"
    max_rows("nt", dtype)  # what the blocks are made of is measured before
    return remembered(question, lambda: last_win(lambda count: _compare(dtype, packs, count), COUNTS))


def _compare(dtype: torch.dtype, packs: bool, count: int) -> list[float]:
    return shortest(*ways(dtype, packs, count), rounds=3)


def ways(dtype: torch.dtype, packs: bool, count: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The fused layer and the blocks, for `count` rows of each of some experts, which are other ones in every call.

    All operands are ones: random values would move the state of the random generator.

    Args:
        dtype: dtype of tokens and weights.
        packs: whether the blocks have packed weights.
        count: rows per expert.
    """
    busy = min(_EXPERTS, max(1, _ROWS // count))
    rows = busy * count
    up = torch.ones(_EXPERTS, 2 * _HIDDEN, _WIDTH, dtype=dtype)
    down = torch.ones(_EXPERTS, _WIDTH, _HIDDEN, dtype=dtype)
    x, weight = torch.ones(-(-rows // 2), _WIDTH, dtype=dtype), torch.ones(rows, dtype=dtype)
    source = torch.arange(rows) % len(x)
    counts = [[count * ((expert - first) % _EXPERTS < busy) for expert in range(_EXPERTS)] for first in range(_EXPERTS)]
    stacked = Stacked(up, None, down, None, Glu(F.silu))
    packed = ([reorder(matrix) for matrix in up], [reorder(matrix) for matrix in down]) if packs else None
    here, there = cycle(map(torch.tensor, counts)), cycle(counts)

    def fused() -> Tensor:
        return cpp.cpp_layer(
            x, source, weight, next(here), None, up, None, None, down, None, None, _HIDDEN, 0, "glu", "silu", 0.0, 0.0
        )

    return fused, lambda: infer_layer(x, source, weight, next(there), stacked, dtype, packed=packed)
