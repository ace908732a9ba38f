"""Collectives over all processes of a training run; in a single process they leave their input as it is."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_BEYOND: ContextVar[Callable[[Tensor], object] | None] = ContextVar("beyond", default=None)


class OnAnotherRank(FloatingPointError):
    """Another process found a NaN or infinity, so this process stops in the same step."""


def join(timeout: float, backend: str | None = None) -> None:
    """Initialise the process group from the environment that torchrun sets, with a limit on how long processes wait.

    Call it before `TrainingArguments` is made, which initialises the group otherwise.

    Args:
        timeout: seconds after which a collective that a process does not join is an error on all others.
        backend: `gloo`, `nccl` or another of torch.distributed; by default that of the available devices.

    Raises:
        ValueError: a timeout that is not positive.
    """
    torch.distributed.init_process_group(backend, timeout=_limit(timeout))


def wait_at_most(timeout: float) -> None:
    """Set how long the collectives of all process groups that exist wait for a process, in seconds.

    Raises:
        ValueError: a timeout that is not positive.
    """
    limit = _limit(timeout)
    if several():
        c10d = torch.distributed.distributed_c10d
        for group in list(c10d._world.pg_map):  # those of meshes beside that of all processes
            c10d._set_pg_timeout(limit, group)


def _limit(timeout: float) -> timedelta:
    if timeout <= 0:
        raise ValueError(f"processes cannot wait for timeout={timeout} seconds; choose a positive number")
    return timedelta(seconds=timeout)


def several() -> bool:
    """Whether torch.distributed was initialised, so that collectives are possible."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def count() -> int:
    """How many processes train together, 1 in a single process."""
    return torch.distributed.get_world_size() if several() else 1


def rank() -> int:
    """The number of this process, 0 in a single process."""
    return torch.distributed.get_rank() if several() else 0


def beside(timeout: float | None = None) -> Any:
    """A group of all processes over gloo, for what they do beside their training; None in a single process.

    All processes call it together. It is made once, with the timeout of the first call.

    Args:
        timeout: seconds that its collectives wait for a process; by default those of gloo.
    """
    if not several():
        return None
    world = torch.distributed.group.WORLD
    if not _BESIDE or _BESIDE[0] is not world:
        limit = None if timeout is None else _limit(timeout)
        _BESIDE[:] = [world, torch.distributed.new_group(backend="gloo", timeout=limit)]
    return _BESIDE[1]


_BESIDE: list[Any] = []
"""The process group of all processes, and the group that was made beside it."""


def gather(value: Any, group: Any = None) -> list[Any]:
    """The values of all processes, in their order, on every process.

    Args:
        value: strings, numbers and collections of them.
        group: of all processes; that of the training by default.
    """
    if not several():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if several():
        torch.distributed.all_reduce(tensor)
    if (add := _BEYOND.get()) is not None:
        add(tensor)
    return tensor


@contextmanager
def summed_beyond(add: Callable[[Tensor], object]) -> Generator[None]:
    """Context manager in which `all_reduce` also sums over processes outside the process group, such as replicas.

    Args:
        add: sums a tensor over them in place.
    """
    token = _BEYOND.set(add)
    try:
        yield
    finally:
        _BEYOND.reset(token)


def broadcast(tensor: Tensor) -> Tensor:
    """The tensor of the first process, in place."""
    if several():
        torch.distributed.broadcast(tensor, 0)
    return tensor


def anywhere(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether a flag is true on any process; all processes get the same result.

    Args:
        flag: of this process.
        device: where the backend of the process group exchanges tensors.
    """
    return bool(all_reduce(torch.tensor(float(flag), device=device))) if several() else flag


@contextmanager
def failing_together(device: torch.device | str = "cpu") -> Generator[None]:
    """Context manager that raises on all processes if one process raises inside it, for which the others would wait.

    Costs a collective of two numbers. Collectives inside must come after all that may raise.

    Args:
        device: where the backend of the process group exchanges tensors.

    Raises:
        OnAnotherRank: nothing but `FloatingPointError` was raised, and not on this process.
        RuntimeError: another error was raised on another process.
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
        raise RuntimeError("another process raised an error, which it prints; this one stops too") from raised
    if raised is not None:
        raise raised
    if ranks_nonfinite:
        raise OnAnotherRank("another process met a value")


@contextmanager
def saying_together(group: Any = None) -> Generator[None]:
    """Context manager that raises on all processes what some of them raised inside, in the words of those.

    Collectives inside must come after all that may raise on one process only, or raise on all of them.

    Args:
        group: of all processes; that of the training by default.

    Raises:
        OSError: processes raised nothing else.
        RuntimeError: on the processes that did not raise, where others raised another error than OSError.
    """
    raised: Exception | None = None
    try:
        yield
    except Exception as error:
        raised = error
    told = gather((raised is not None, isinstance(raised, OSError), str(raised)), group)
    failed = [(number, of_system, text) for number, (fails, of_system, text) in enumerate(told) if fails]
    if not failed:
        return
    said = "; ".join(f"rank {number}: {text}" if len(told) > 1 else text for number, _, text in failed)
    if all(of_system for _, of_system, _ in failed):
        raise OSError(said) from raised
    raise raised or RuntimeError(said)


_GLOO_SECONDS = 5.0
"""The longest that the end of the interpreter waits for gloo's threads."""


@atexit.register
def _wait_for_gloo() -> None:
    """Let gloo's threads come to rest before the interpreter ends.

    After a collective such a thread lets go of its tensors. If it is the last to do so once the interpreter ends, it
    waits for a lock that nobody gives any more, and aborts the process (SIGABRT, "terminate called without an active
    exception"). A thread that has work is runnable, and one at rest sleeps; Linux tells them apart.
    """
    calm, end = 0, time.monotonic() + _GLOO_SECONDS
    while calm < 3 and time.monotonic() < end:
        states = [
            stat for task in Path("/proc/self/task").glob("*/stat") if "(pt_gloo_runloop)" in (stat := _read(task))
        ]
        if not states:
            return
        calm = 0 if any(") S " not in state for state in states) else calm + 1
        time.sleep(0.001)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:  # the thread has ended
        return ""
