"""Which stored dtypes can be loaded into which dtypes of a model, and the dtypes of buffers that are not stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

REAL = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
"""The dtypes of unquantised weights; 8-bit dtypes need scales, which only quantised layers have."""


_NAMES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
"""The names of dtypes in safetensors headers."""


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype for a name in a safetensors header, None for an unsupported one."""
    return _NAMES.get(name)


def fits(own: torch.dtype, stored: torch.dtype | None) -> bool:
    """Whether a stored tensor can be loaded: the dtypes are equal, or both are in `REAL`."""
    return own == stored or (own in REAL and stored in REAL)


def cast_buffers(model: nn.Module, dtypes: dict[str, Any], path: Path) -> None:
    """Cast buffers that are not stored to the dtypes that they had when the model was saved.

    Args:
        model: the model.
        dtypes: names of dtypes by names of buffers.
        path: path of the config, for error messages.

    Raises:
        ValueError: the model has no such buffer, or there is no such dtype.
    """
    own = dict(model.named_buffers())
    for name, dtype in dtypes.items():
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else None
        if name not in own or kind not in REAL:
            raise ValueError(f"{path} is damaged: it says that the buffer {name} is {dtype!r}")
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, own[name].to(kind))
