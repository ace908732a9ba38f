"""Processes that die before a certain file operation, and what a folder holds afterwards."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

OPERATIONS = ("rename", "replace", "fsync", "unlink", "rmdir", "mkdir")
KILLED = 9

forks = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are forked")


def _die_before(at: int, work: Callable[[Path], object], folder: Path) -> None:
    count = 0

    def dying(operation):
        def operate(*arguments, **options):
            nonlocal count
            count += 1
            if count == at:
                os._exit(KILLED)
            return operation(*arguments, **options)

        return operate

    for name in OPERATIONS:
        setattr(os, name, dying(getattr(os, name)))
    work(folder)
    os._exit(0)


def killed_at_every_operation(
    work: Callable[[Path], object], start: Path, places: Path, step: int = 1
) -> Iterator[tuple[Path, bool]]:
    """Copies of a folder in which some work was killed before its first, second, ... file operation, or each `step`-th.

    The last one is that of work which was not killed, and comes with True.
    """
    for at in range(1, 200, step):
        folder = shutil.copytree(start, places / str(at))
        process = multiprocessing.get_context("fork").Process(target=_die_before, args=(at, work, folder))
        process.start()
        process.join()
        assert process.exitcode in (0, KILLED)
        yield folder, process.exitcode == 0
        if process.exitcode == 0:
            assert at > 3
            return
    raise AssertionError("the work does not end")
