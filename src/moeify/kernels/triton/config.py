"""Tile sizes of the Triton kernels in a static table: layers start at once and compute the same on every run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from moeify.kernels.triton.launch import power_of_2

Kernel = Literal["product", "activation_backward", "product_tn"]
"""Rows times weights; the same with the derivative of the activation; sums of outer products of rows."""


@dataclass(frozen=True)
class Config:
    """How a grouped product is cut into programs.

    Attributes:
        m: rows of a tile.
        n: columns of a tile.
        k: depth of one step of the sum.
        warps: warps of a program.
        stages: steps that are loaded ahead.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def within(self, *, m: int | None = None, n: int, k: int | None = None) -> Config:
        """No larger than a product of m x n with sums over k: for narrow matrices, such as those of low rank."""
        limits = {"m": m, "n": n, "k": k}
        sizes = {name: min(getattr(self, name), max(16, power_of_2(x))) for name, x in limits.items() if x is not None}
        return replace(self, **sizes)


def table(
    family: Literal["ampere", "hopper"], kernel: Kernel, dtype: torch.dtype, rows_per_expert: int, *widths: int
) -> Config:
    """The static table; rows per expert choose m, as a tile that is half empty computes for nothing.

    Hopper, as the Blackwell of data centres, has 228 KB of shared memory and instructions 256 columns wide; Ampere and
    all others get what fits in 100 KB. fp32 takes twice the memory of bf16, and unaligned rows take registers, an
    address for every number.
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
