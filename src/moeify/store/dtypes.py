"""Which dtypes of a file may stand for which of a model."""

from __future__ import annotations

import torch

REAL = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
"""The dtypes of ordinary weights; those of 8 bits need scales beside them, which only quantised layers have."""


def fits(own: torch.dtype, stored: torch.dtype) -> bool:
    """Whether a tensor of a file can be one of a model: of the same dtype, or both are ordinary weights."""
    return own == stored or (own in REAL and stored in REAL)
