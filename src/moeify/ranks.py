"""Collectives over all processes of a training run; in a single process they leave their input as it is."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import Tensor


class OnAnotherRank(FloatingPointError):
    """Another rank found a NaN or infinity, so this rank stops in the same step."""


def join(timeout: float, backend: str | None = None) -> None:
    """Initialise the process group from the environment that torchrun sets, with a limit on how long ranks wait.

    Call it before `TrainingArguments` is made, which initialises the group otherwise.

    Args:
        timeout: seconds after which a collective that a rank does not join is an error on all others.
        backend: `gloo`, `nccl` or another of torch.distributed; by default that of the available devices.

    Raises:
        ValueError: a timeout that is not positive.
    """
    torch.distributed.init_process_group(backend, timeout=_limit(timeout))


def wait_at_most(timeout: float) -> None:
    """Set how long the collectives of an initialised process group wait for a rank, in seconds.

    Raises:
        ValueError: a timeout that is not positive.
    """
    limit = _limit(timeout)
    if several():
        torch.distributed.distributed_c10d._set_pg_timeout(limit)


def _limit(timeout: float) -> timedelta:
    if timeout <= 0:
        raise ValueError(f"ranks cannot wait for timeout={timeout} seconds; choose a positive number")
    return timedelta(seconds=timeout)


def several() -> bool:
    """Whether torch.distributed was initialised, so that collectives are possible."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def count() -> int:
    """How many ranks train together, 1 in a single process."""
    return torch.distributed.get_world_size() if several() else 1


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


@contextmanager
def failing_together(device: torch.device | str = "cpu") -> Generator[None]:
    """Context manager that raises on all ranks if one rank raises inside it, for which the others would wait.

    Costs a collective of two numbers. Collectives inside must come after all that may raise.

    Args:
        device: where the backend of the process group exchanges tensors.

    Raises:
        OnAnotherRank: nothing but `FloatingPointError` was raised, and not on this rank.
        RuntimeError: another error was raised on another rank.
    """
    raised: Exception | None = None
    try:
        yield
    except Exception as error:
        raised = error
    nonfinite = isinstance(raised, FloatingPointError)
    flags = torch.tensor([float(nonfinite), float(raised is not None and not nonfinite)], device=device)
    ranks_nonfinite, ranks_failed = all_reduce(flags).tolist()
    if ranks_failed and (raised is None or nonfinite):
        raise RuntimeError("another rank raised an error, which it prints; this one stops too") from raised
    if raised is not None:
        raise raised
    if ranks_nonfinite:
        raise OnAnotherRank("another rank met a value")
