"""The tile table of grouped GEMMs in Triton: the rows that each program computes, computed on the device.

Every tile has at most `block` rows of one expert. The number of tiles depends on the counts, which are on the device;
so the host launches the largest possible number of programs, ceil(R / block) + E, and those beyond the last tile return
at once. No host-device synchronisation is needed, and a CUDA graph is valid for all routing decisions with R rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

from moeify.kernels.triton.launch import launch


def tile_table(counts: Int[Tensor, "E"], rows: int, block: int) -> Int[Tensor, "3 tiles"]:
    """Expert, first row and row after the last of every tile, int32; all are -1 for unused tiles."""
    tiles = triton.cdiv(rows, block) + counts.shape[0]
    table = counts.new_empty(3, tiles, dtype=torch.int32)
    programs = triton.cdiv(tiles, 128)
    launch(_tile_table, programs, counts, table, counts.shape[0], tiles, BLOCK=block, TILES=128, EXPERTS=32)
    return table


def naive_tile_table(counts: Int[Tensor, "E"], rows: int, block: int) -> Int[Tensor, "3 tiles"]:
    """The reference implementation of `tile_table`."""
    tiles, begin = [], 0
    for expert, count in enumerate(counts.tolist()):
        tiles += [(expert, first, min(first + block, begin + count)) for first in range(begin, begin + count, block)]
        begin += count
    table = torch.full((3, triton.cdiv(rows, block) + len(counts)), -1, dtype=torch.int32)
    table[:, : len(tiles)] = torch.tensor(tiles, dtype=torch.int32).view(-1, 3).t()
    return table


@triton.jit
def _tile_table(counts, table, E, tiles, BLOCK: tl.constexpr, TILES: tl.constexpr, EXPERTS: tl.constexpr):
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    expert = tl.zeros((TILES,), tl.int32)
    first = tl.zeros((TILES,), tl.int32)
    end = tl.zeros((TILES,), tl.int32)
    total = 0  # tiles of preceding experts
    for begin in range(0, E, EXPERTS):
        e = begin + tl.arange(0, EXPERTS)
        count = tl.load(counts + e, mask=e < E, other=0).to(tl.int32)
        ends = total + tl.cumsum((count + BLOCK - 1) // BLOCK, 0)
        starts = ends - (count + BLOCK - 1) // BLOCK
        before = (ends[None, :] <= tile[:, None]) & (
            e[None, :] < E
        )  # (TILES, EXPERTS): experts that precede this tile's
        mine = (starts[None, :] <= tile[:, None]) & (tile[:, None] < ends[None, :])
        expert += tl.sum(before.to(tl.int32), 1)
        rows_before = tl.sum(tl.where(before, count[None, :], 0), 1)
        first += rows_before + tl.sum(tl.where(mine, (tile[:, None] - starts[None, :]) * BLOCK, 0), 1)
        end += rows_before + tl.sum(tl.where(mine, count[None, :], 0), 1)
        total += _sum((count + BLOCK - 1) // BLOCK)
    used = tile < total
    tl.store(table + tile, tl.where(used, expert, -1), mask=tile < tiles)
    tl.store(table + tiles + tile, tl.where(used, first, -1), mask=tile < tiles)
    tl.store(table + 2 * tiles + tile, tl.where(used, tl.minimum(first + BLOCK, end), -1), mask=tile < tiles)


@triton.jit
def _sum(numbers) -> Any:
    return tl.sum(numbers, 0)  # Triton's type annotation is a tuple
