"""How the C++ kernels read the weights of an expert with one row, measured on this processor.

The weights come from memory and each is used once, so bandwidth decides. Some processors follow a single stream, one
row of weights after another, by their own prefetching; others are told what comes next, into L2 or into L1; and where
instructions are the limit, four rows abreast share the loads of the activations.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.kernels.cpu.cpp.build import level, library, why_not
from moeify.kernels.cpu.cpp.compiler import name
from moeify.kernels.cpu.cpp.structs import ACTIVATIONS, FORMATS, GATING, Call, Stack
from moeify.kernels.cpu.huge_pages import in_huge_pages
from moeify.kernels.cpu.probes import remembered, shortest

NEVER, INTO_L2, INTO_L1 = range(3)


class Reading(NamedTuple):
    """Whether weights are read one row after another or several abreast, and the cache they are prefetched into."""

    in_order: bool
    prefetch: int


READINGS = (
    Reading(in_order=True, prefetch=INTO_L2),
    Reading(in_order=True, prefetch=NEVER),
    Reading(in_order=True, prefetch=INTO_L1),
    Reading(in_order=False, prefetch=INTO_L2),
    Reading(in_order=False, prefetch=INTO_L1),
)
"""The readings that are compared; the first is used for weights that fit into a cache."""

_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "8 bits": torch.int8, "4 bits": torch.uint8}
_ORDERS = {True: "in order", False: "abreast"}
_TARGETS = {NEVER: "by hardware", INTO_L2: "into L2", INTO_L1: "into L1"}

_LARGE = 2**23  # bytes of weights from which on they are measured
_BYTES = 2**27  # of the weights of a comparison
_MARGIN = 0.95  # of the time of the first reading that another one may take to replace it
_WIDTH, _HIDDEN, _GROUP = 1024, 2048, 64


def reading(dtype: torch.dtype, size: int) -> Reading:
    """How weights are read; measured once per processor, in less than a second. Outputs differ by rounding at most.

    Small weights, and all weights under `torch.use_deterministic_algorithms(True)`, have the first of `READINGS`.

    Args:
        dtype: of the weights as they are stored.
        size: of the weights, in bytes.
    """
    if size < _LARGE or torch.are_deterministic_algorithms_enabled():
        return READINGS[0]
    return READINGS[_fastest(dtype, level())]


def explain() -> str:
    """How large weights of each storage format are read, "none" where the kernels are unavailable."""
    if why_not() is not None:
        return "none"
    found = {stored: reading(dtype, _LARGE) for stored, dtype in _FORMATS.items()}
    return ", ".join(f"{stored} {_ORDERS[how.in_order]} {_TARGETS[how.prefetch]}" for stored, how in found.items())


@cache
def _fastest(dtype: torch.dtype, level: str) -> int:
    return remembered(f"the reading of {dtype} by {name(level)}", lambda: _measure(dtype))


def _measure(dtype: torch.dtype) -> int:
    """The number of the fastest reading."""
    first, *others = shortest(*ways(dtype)[1], rounds=5)
    return 1 + others.index(min(others)) if min(others) < _MARGIN * first else 0


def ways(dtype: torch.dtype) -> tuple[Float[Tensor, "1 D"], list[Callable[[], None]]]:
    """A layer whose experts have one row each, as many as fill more than a cache, with every reading.

    All weights are ones: random values would move the state of the random generator.

    Args:
        dtype: of the weights as they are stored.

    Returns:
        The output, to which each adds, and one function per reading.
    """
    wide = torch.bfloat16 if dtype.itemsize < 4 else dtype
    packed, one = (2, 0x99) if dtype == torch.uint8 else (1, 1)
    num_experts = _BYTES * packed // (3 * _WIDTH * _HIDDEN * dtype.itemsize)
    up, down, scales = (
        in_huge_pages(torch.empty(num_experts, rows, columns, dtype=kind)).fill_(one)
        for rows, columns, kind, one in (
            (2 * _HIDDEN, _WIDTH // packed, dtype, one),
            (_WIDTH, _HIDDEN // packed, dtype, one),
            (2 * _HIDDEN, _WIDTH // _GROUP, torch.float32, 1),
        )
    )
    x, y, weight = torch.ones(1, _WIDTH, dtype=wide), torch.zeros(1, _WIDTH), torch.ones(num_experts)
    source, counts = torch.zeros(num_experts, dtype=torch.int64), torch.ones(num_experts, dtype=torch.int64)

    def stack(stored: Tensor, way: Reading) -> Stack:
        return Stack(
            stored.data_ptr(), scales.data_ptr(), None, stored.stride(0), stored.stride(1), 0, FORMATS[dtype], _GROUP,
            *way,
        )  # fmt: skip

    def run(way: Reading) -> None:
        call = Call(
            x.data_ptr(), _WIDTH, 1, num_experts, source.data_ptr(), weight.data_ptr(), counts.data_ptr(),
            num_experts, _WIDTH, _HIDDEN, _WIDTH, stack(up, way), stack(down, way),
            GATING.index("glu"), ACTIVATIONS.index("relu"), 0, 0, y.data_ptr(), 1,
        )  # fmt: skip
        library().moeify_layer(ctypes.byref(call), wide == torch.bfloat16)

    return y, [partial(run, way) for way in READINGS]
