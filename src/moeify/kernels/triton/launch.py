"""Launch Triton kernels: grid, precision, interpreter mode and contiguous inputs."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on a CPU; enabled by `TRITON_INTERPRET=1` before the import."""


def launch(kernel: Any, grid: int, *arguments: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any) -> None:
    """Launch `grid` programs of a kernel on the device of its first argument, a tensor.

    A grid of 0 is not launched, as CUDA rejects it.
    """
    if grid > 0:
        with torch.cuda.device_of(arguments[0]):
            kernel[(grid,)](*arguments, num_warps=num_warps, num_stages=num_stages, **constants)


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """Kernel constants for the precision of products; fp32 follows `torch.set_float32_matmul_precision`.

    "highest" computes three tf32 products on the tensor cores, with the error of fp32. The interpreter computes in fp32
    for every dtype, as numpy has no bf16.
    """
    exact = torch.get_float32_matmul_precision() == "highest"
    return {
        "PRECISION": "ieee" if INTERPRETED else "tf32x3" if exact and dtype == torch.float32 else "tf32",
        "UPCAST": INTERPRETED,
    }


def power_of_2(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << max(0, size - 1).bit_length()


def in_order(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous tensors, which kernels require of all arguments but weights; None stays None."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
