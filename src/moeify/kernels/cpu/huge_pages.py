"""Memory in huge pages."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

from torch import Tensor


def in_huge_pages(fresh: Tensor) -> Tensor:
    """Ask the system to map fresh memory by pages of 2 MiB instead of 4 KiB: 512 times fewer faults."""
    if (madvise := advise()) is not None:
        start = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        madvise(start, fresh.data_ptr() + fresh.nbytes - start, mmap.MADV_HUGEPAGE)  # advice only: failing does no harm
    return fresh


@cache
def advise() -> Any:
    """The system's `madvise`, None where it knows no huge pages."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
