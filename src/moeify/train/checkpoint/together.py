"""One checkpoint written by all ranks: each writes its shards, and the first one commits when all have."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from moeify import ranks
from moeify.files import fingerprint, sync
from moeify.notices import notify
from moeify.train.checkpoint.folder import begun, commit, seal, temporary
from moeify.train.checkpoint.shards import require_space, size_of, write_shards
from moeify.train.checkpoint.stored import describe

Parts = Mapping[str, Mapping[str, Tensor]]


def write_together(
    final: Path,
    parts: Parts,
    write_others: Callable[[Path], None],
    then: Callable[[], None] = lambda: None,
    *,
    group: Any = None,
    background: bool = False,
) -> Future[None]:
    """Write a checkpoint by all processes; it has its final name once everything of all of them is on disk.

    An error on any process is one on all; it removes what was written, and the checkpoint before stays.

    Args:
        final: its folder, which all processes see.
        parts: the tensors of each folder of shards, from `moeify.train.checkpoint.shards.writable`.
        write_others: writes all other files into a folder; called on the first process, and never in the background.
        then: called on the first process once the checkpoint has its name.
        group: of all processes; `group_of_checkpoints()`, where in the background.
        background: write the shards in a thread; `parts` must be copies. The next save waits for it.

    Returns:
        Done when the checkpoint has its final name, or with the error that the background met.

    Raises:
        OSError: there is no room, or a process could not write.
        RuntimeError: anything else went wrong on another process.
    """
    with _removed_on_error(final), ranks.saying_together(group):
        if ranks.rank() == 0:
            require_space(begun(final).parent, sum(map(size_of, parts.values())))
            write_others(temporary(final))
    done = Future[None]()
    if background:
        _RUNNING.append(done)
        Thread(target=_finish, args=(done, final, parts, then, group), name="moeify-checkpoint").start()
    else:
        _write(final, parts, then, group)
        done.set_result(None)
    return done


_RUNNING: list[Future[None]] = []
"""The save in the background, if there is one."""


def group_of_checkpoints(timeout: float | None = None) -> Any:
    """The group of all processes over which checkpoints are written and read, once a background save has left it.

    All processes call it together.

    Args:
        timeout: seconds, as of `moeify.ranks.beside`.
    """
    while _RUNNING:
        _RUNNING.pop().exception()
    return ranks.beside(timeout)


def _finish(done: Future[None], final: Path, parts: Parts, then: Callable[[], None], group: Any) -> None:
    try:
        _write(final, parts, then, group)
    except BaseException as error:  # it is raised where the future is waited for
        if ranks.rank() == 0:
            notify(f"moeify: {final.name} could not be saved ({error}); earlier checkpoints are untouched")
        done.set_exception(error)
    else:
        done.set_result(None)


def _write(final: Path, parts: Parts, then: Callable[[], None], group: Any) -> None:
    folder = temporary(final)
    with _removed_on_error(final):
        for part, tensors in parts.items():
            write_shards(tensors, folder / part, group)
        mine: dict[str, Any] = {}
        with ranks.saying_together(group):
            for path in folder.glob(f"*/shard-{ranks.rank() + 1:05d}-*"):
                sync(path)
                sync(path.parent)
                mine[path.relative_to(folder).as_posix()] = fingerprint(path)
        known = {name: found for of_rank in ranks.gather(mine, group) for name, found in of_rank.items()}
        with ranks.saying_together(group):
            if ranks.rank() == 0:
                tensors = {
                    part: {n: describe(t.shape, t.dtype) for n, t in held.items()} for part, held in parts.items()
                }
                seal(folder, known, tensors=tensors)
                commit(folder, final)
                then()


@contextmanager
def _removed_on_error(final: Path) -> Generator[None]:
    try:
        yield
    except BaseException:
        if ranks.rank() == 0:
            shutil.rmtree(temporary(final), ignore_errors=True)
        raise


def warn_of_shared_store() -> None:
    """Print how torchrun is to be called, where processes that it starts anew would read the addresses of dead ones."""
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)
    if restarts and ranks.rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        notify(
            f"moeify: torchrun may restart processes {restarts} times, and they may then wait for dead ones; call it "
            "with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment and --standalone or --rdzv-backend c10d"
        )
