"""The activation between two projections and its gradient in C++, in one pass each."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.kernels.cpu.cpp.build import library
from moeify.kernels.cpu.cpp.structs import ACTIVATIONS, GATING


class _Between(ctypes.Structure):
    _fields_ = (
        ("before", c_void_p), ("gradient", c_void_p), ("scale", c_void_p), ("out", c_void_p), ("dots", c_void_p),
        ("rows", c_int64), ("hidden", c_int64),
        ("gating", c_int32), ("activation", c_int32), ("is_bf16", c_int32), ("threads", c_int32),
    )  # fmt: skip


def activate(before: Float[Tensor, "R M"], gating: str, name: str) -> Float[Tensor, "R H"]:
    """The hidden units of rows.

    Args:
        before: contiguous inputs of the activation, in fp32 or bf16; with "glu" gate and up side by side.
        gating: "plain" or "glu".
        name: the elementwise activation, of `moeify.kernels.stacked.KNOWN`.

    Raises:
        Unavailable: the C++ kernels are not available.
    """
    hidden = before.new_empty(len(before), before.shape[1] // (2 if gating == "glu" else 1))
    _call(before, None, None, hidden, None, gating=gating, name=name)
    return hidden


def differentiate(
    before: Float[Tensor, "R M"], gradient: Float[Tensor, "R H"], scale: Float[Tensor, "R"], gating: str, name: str
) -> tuple[Float[Tensor, "R M"], Float[Tensor, "R"]]:
    """The gradient by the inputs of the activation, and that by the scale of each row.

    Args:
        before: as of `activate`.
        gradient: contiguous, that by the scaled hidden units, in the dtype of `before`.
        scale: what the hidden units of each row are multiplied by, in fp32.
        gating: "plain" or "glu".
        name: the elementwise activation.

    Raises:
        Unavailable: the C++ kernels are not available.
    """
    out, dots = torch.empty_like(before), before.new_empty(len(before), dtype=torch.float32)
    _call(before, gradient, scale.contiguous(), out, dots, gating=gating, name=name)
    return out, dots


def _call(before: Tensor, *others: Tensor | None, gating: str, name: str) -> None:
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in (before, *others))
    hidden = before.shape[1] // (2 if gating == "glu" else 1)
    call = _Between(
        *pointers, len(before), hidden, GATING.index(gating), ACTIVATIONS.index(name),
        before.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    library().moeify_between(ctypes.byref(call))
