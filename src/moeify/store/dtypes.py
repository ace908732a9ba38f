"""Which dtypes of a file may stand for which of a model."""

from __future__ import annotations

import torch

REAL = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
"""The dtypes of ordinary weights; those of 8 bits need scales beside them, which only quantised layers have."""


_NAMES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
"""What safetensors calls the dtypes that models are saved in."""


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype that a header names, None for one that is not known here."""
    return _NAMES.get(name)


def fits(own: torch.dtype, stored: torch.dtype | None) -> bool:
    """Whether a tensor of a file can be one of a model: of the same dtype, or both are ordinary weights."""
    return own == stored or (own in REAL and stored in REAL)
