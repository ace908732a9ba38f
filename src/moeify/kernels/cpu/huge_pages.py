"""Back tensors by huge pages, new ones or where they lie: one TLB entry covers 2 MiB instead of 4 KiB."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_HUGE = 2**21
_LINE = 64
_COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1, which Python's mmap does not name
_TRIES = 3  # it fails for a moment where the system holds on to a page
_SMALLEST = 2**23  # bytes from which on a weight exceeds what the TLB covers by small pages

_FIRST_PROCESS = os.getpid()
_ASKED: dict[int, int] = {}
"""Size of the memory at each address for which `in_place` has asked."""


def in_huge_pages(fresh: Tensor) -> Tensor:
    """Ask the operating system to back new memory by pages of 2 MiB instead of 4 KiB: 512 times fewer page faults."""
    if (madvise := advise()) is not None:
        start = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        madvise(start, fresh.data_ptr() + fresh.nbytes - start, mmap.MADV_HUGEPAGE)  # a hint only: errors are ignored
    return fresh


def in_place(weight: Tensor) -> None:
    """Ask the operating system, once, to back a large weight by huge pages where it lies; address and values stay.

    Linux collapses the pages at once, at about 2 GB per second, from version 6.1 on; elsewhere nothing happens. In a
    virtual machine whose free memory goes back to its host, the host has to hand it out anew: 0.5 GB per second. A
    child that shares the weights of its parent by fork leaves them, since it would get a copy of its own.

    Args:
        weight: on a CPU, without gaps between its elements; a transposed view is the same weight.
    """
    start, size = weight.data_ptr(), weight.numel() * weight.itemsize
    if size < _SMALLEST or _ASKED.get(start) == size:
        return
    _ASKED[start] = size
    if os.getpid() != _FIRST_PROCESS or (madvise := advise()) is None:
        return
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    for advice in (mmap.MADV_HUGEPAGE, *[_COLLAPSE] * _TRIES):  # hints only: errors are ignored
        if madvise(first, last - first, advice) == 0 and advice == _COLLAPSE:
            return


@cache
def advise() -> Any:
    """The `madvise` function of the C library, None on systems without huge pages."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


@torch.no_grad()
def into_huge_pages(modules: Iterable[nn.Module]) -> None:
    """Move the parameters and buffers of modules into one contiguous block of memory, in their order; in place.

    They remain the same tensor objects, each with a storage of its own, as `torch.save` and safetensors need. The old
    memory of each is freed once it has moved, so at most one tensor exists twice. Nothing is moved on systems without
    huge pages.
    """
    if advise() is None:
        return
    tensors = list({id(t): t for m in modules for t in (*m.parameters(), *m.buffers()) if _can_move(t)}.values())
    sizes = [-(-tensor.nbytes // _LINE) * _LINE for tensor in tensors]
    memory = in_huge_pages(torch.empty(sum(sizes) + _HUGE, dtype=torch.uint8))
    at, buffer = -memory.data_ptr() % _HUGE, memory.numpy()
    for tensor, size in zip(tensors, sizes, strict=True):
        place = torch.frombuffer(buffer, dtype=tensor.dtype, count=tensor.numel(), offset=at)
        tensor.data = place.view(tensor.shape).copy_(tensor)
        at += size


def _can_move(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and tensor.is_contiguous() and tensor.numel() > 0
