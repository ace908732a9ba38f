"""Collectives over all processes of a training run; in a single process they leave their input as it is."""

from __future__ import annotations

import torch
from torch import Tensor


def several() -> bool:
    """Whether torch.distributed was initialised, so that there are other ranks to talk to."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    if several():
        torch.distributed.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """The tensor of the first rank, in place."""
    if several():
        torch.distributed.broadcast(tensor, 0)
    return tensor


def anywhere(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether a flag is true on any rank; all ranks get the same result.

    Args:
        flag: of this rank.
        device: where the backend of the process group exchanges tensors.
    """
    return bool(all_reduce(torch.tensor(float(flag), device=device))) if several() else flag
