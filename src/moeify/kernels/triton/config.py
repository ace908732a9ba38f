"""Static table of tile sizes for the Triton kernels: no warm-up, and the same results in every run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from moeify.kernels.triton.launch import power_of_2

Kernel = Literal["product", "activation_backward", "product_tn"]
"""Forward grouped GEMM; backward of down projection and activation; grouped GEMM for weight gradients."""


@dataclass(frozen=True)
class Config:
    """Tile sizes and launch parameters of a grouped GEMM.

    Attributes:
        m: rows of a tile.
        n: columns of a tile.
        k: elements of the inner dimension per step.
        warps: warps per program.
        stages: stages of software pipelining.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def within(self, *, m: int | None = None, n: int, k: int | None = None) -> Config:
        """The sizes clipped to an (m, n) product with inner dimension k: for small matrices, such as low-rank ones."""
        limits = {"m": m, "n": n, "k": k}
        sizes = {name: min(getattr(self, name), max(16, power_of_2(x))) for name, x in limits.items() if x is not None}
        return replace(self, **sizes)


def table(
    family: Literal["ampere", "hopper"], kernel: Kernel, dtype: torch.dtype, rows_per_expert: int, *widths: int
) -> Config:
    """The tile sizes of the static table; m grows with the rows per expert, as padding a tile wastes computation.

    Hopper and data-centre Blackwell have 228 KB of shared memory and matrix instructions 256 columns wide; sizes for
    Ampere and all others fit in 100 KB. fp32 takes twice the memory of bf16, and unaligned rows take more registers,
    one address per element.
    """
    aligned = all(width % 16 == 0 for width in widths)
    if dtype == torch.float32:
        return Config(64, 64 if aligned else 32, 32, 4, 2)
    if not aligned:
        return Config(64, 64, 32, 8, 2)
    if kernel == "product_tn":
        return Config(128, 256, 64, 8, 5) if family == "hopper" else Config(128, 128, 32, 8, 3)
    if rows_per_expert <= 24:
        return Config(16, 64, 128, 4, 4) if family == "hopper" else Config(16, 64, 64, 4, 4)
    if rows_per_expert <= 96:
        return Config(64, 128, 64, 4, 4) if family == "hopper" else Config(64, 64, 64, 4, 3)
    if family == "ampere":
        return Config(128, 128, 32, 8, 3)
    return Config(128, 256, 64, 8, 3) if kernel == "product" else Config(128, 128, 64, 8, 4)
