"""Let the C library keep the memory that a training step frees, so that the system need not map it anew in the next.

glibc returns large blocks and the free end of its heap to the system. A training step frees nearly all it has
allocated, so each step would begin with page faults and pages to be zeroed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

KEPT = (2**28, 2**25)
"""Bytes of a block up to which its memory is kept, the second where glibc takes no more; that of larger blocks, as of
weights, is returned."""

TUNED = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
"""Environment variables by which users tune glibc's malloc; where one is set, nothing else is."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them
_NEVER = 2**31 - 1  # the largest value that mallopt takes


def keep_freed(environment: Mapping[str, str] = os.environ) -> int:
    """Let glibc's malloc keep freed memory as long as the process lives, unless the user tuned it.

    Returns the bytes of a block up to which it does, 0 if it does not.
    """
    mallopt = _mallopt()
    if mallopt is None or _tuned(environment):
        return 0
    return next((size for size in KEPT if mallopt(_MMAP_THRESHOLD, size) and mallopt(_TRIM_THRESHOLD, _NEVER)), 0)


def describe(environment: Mapping[str, str] = os.environ) -> str:
    """Which memory malloc keeps in a training."""
    if tuned := _tuned(environment):
        return f"as {', '.join(tuned)} says"
    if _mallopt() is None:
        return "as the C library decides"
    large, small = (size // 2**20 for size in KEPT)
    return f"a training keeps freed blocks of up to {large} MiB, or {small} where glibc takes no more"


def _tuned(environment: Mapping[str, str]) -> list[str]:
    return [name for name in TUNED if environment.get(name)]


@cache
def _mallopt() -> Any:
    """The function that tunes glibc's malloc, None with other C libraries."""
    if os.name != "posix":
        return None
    import ctypes

    library = ctypes.CDLL(None)
    return library.mallopt if hasattr(library, "gnu_get_libc_version") else None
