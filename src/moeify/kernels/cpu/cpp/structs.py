"""The C structs that several of the kernels take, and the numbers that stand for names in them."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch

from moeify.kernels.stacked import KNOWN

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
"""The storage format of weights by dtype; uint8 packs two int4 weights."""
GATING = ["plain", "glu", "clamped"]
ACTIVATIONS = list(KNOWN)


class Stack(ctypes.Structure):
    """Projections of all experts."""

    _fields_ = (
        ("data", c_void_p), ("scales", c_void_p), ("bias", c_void_p),
        ("expert_stride", c_int64), ("row_stride", c_int64), ("bias_stride", c_int64),
        ("format", c_int32), ("group_size", c_int32), ("in_order", c_int32), ("prefetch", c_int32),
    )  # fmt: skip


class Call(ctypes.Structure):
    """A fused sparse layer and its tokens."""

    _fields_ = (
        ("x", c_void_p), ("x_stride", c_int64), ("tokens", c_int64), ("rows", c_int64),
        ("source", c_void_p), ("weight", c_void_p), ("counts", c_void_p),
        ("experts", c_int64), ("width", c_int64), ("hidden", c_int64), ("width_out", c_int64),
        ("up", Stack), ("down", Stack),
        ("gating", c_int32), ("activation", c_int32), ("alpha", c_float), ("limit", c_float),
        ("y", c_void_p), ("threads", c_int32),
    )  # fmt: skip
