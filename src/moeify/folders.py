"""Folders that one process at a time writes to, and whose files change all at once.

    folder/.moeify-save/     new/ holds what is being written, obsolete.json names the files that go
    folder/.moeify-commit/   the same, complete and on disk: its new name is the commit

A kill before the commit leaves the folder unchanged. After the commit all of the new files exist, and `finish` moves
them to their places, however often it is interrupted. It deletes the old ones first, so that a program without this
protocol finds an incomplete folder in between, never old files beside new ones.
"""

from __future__ import annotations

import errno
import inspect
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeify.files import read_json, sync, write_json
from moeify.notices import notify

_STAGE, _COMMIT = ".moeify-save", ".moeify-commit"
_OBSOLETE = "obsolete.json"
SAVE_LOCK, RUN_LOCK = ".moeify-save.lock", ".moeify-run.lock"


@contextmanager
def locked(folder: Path, name: str, doing: str, *, wait: float = 0.0) -> Generator[None]:
    """Lock a folder against other processes that do the same; the system releases the lock whenever this process ends.

    Where the file system has no locks, this is printed and nothing is locked.

    Args:
        folder: created if missing.
        name: of the file that is locked; it is deleted afterwards.
        doing: what the other process is doing in the folder, for the message: "is saving a model".
        wait: seconds to wait for the other process.

    Raises:
        OSError: another process holds the lock, or the folder cannot be written to.
    """
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    known = inspect.signature(filelock.FileLock).parameters
    # a soft lock is a file that a kill leaves behind
    options: dict[str, Any] = {"fallback_to_soft": False} if "fallback_to_soft" in known else {}
    lock = filelock.FileLock(folder / name, timeout=wait, **options)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise OSError(
            f"another process {doing} in {folder} (it holds the lock {name}); wait until it ends, or name another "
            "folder"
        ) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        notify(f"moeify: the file system of {folder} has no locks ({error}); let only one process write there")
    try:
        yield
    finally:
        if os.name != "nt":  # before it is released: the next process creates a new file
            with suppress(OSError):
                (folder / name).unlink()
        lock.release()


def is_locked(lock: Path) -> bool:
    """Whether a process holds the lock of a file, see `locked`."""
    import filelock

    if not lock.exists():
        return False
    try:
        with filelock.FileLock(lock, timeout=0):
            return False
    except filelock.Timeout:
        return True
    except (NotImplementedError, OSError):  # a file system without locks, or a folder that others own
        return False


_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


@dataclass
class Stage:
    """New files of a folder before the commit.

    Attributes:
        new: an empty folder to write them into.
        obsolete: files of the folder, by their names in it, that are deleted with the commit.
    """

    new: Path
    obsolete: set[str]


@contextmanager
def replacing_files(folder: Path, doing: str = "is saving") -> Generator[Stage]:
    """Write several files of a folder, nested ones too, all or none of them, even in a crash.

    Old and new files are on disk together until the commit. An exception inside leaves the folder unchanged.

    Raises:
        OSError: another process is saving into the folder, the disk is full, or the folder cannot be written to.
    """
    with locked(folder, SAVE_LOCK, doing):
        _finish(folder)
        stage, new = folder / _STAGE, folder / _STAGE / "new"
        shutil.rmtree(stage, ignore_errors=True)
        new.mkdir(parents=True)
        try:
            files = Stage(new, set())
            yield files
            written = _files(new)
            for name in written:
                _refuse_folder(folder / name)
            for path in sorted({new, *(new / name for name in written), *((new / name).parent for name in written)}):
                sync(path)
            write_json(stage / _OBSOLETE, {"obsolete": sorted(files.obsolete - written)})
            os.rename(stage, folder / _COMMIT)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        sync(folder)
        _finish(folder)


def finish(folder: Path) -> None:
    """Finish a save that a kill interrupted after its commit; call it before the files of a folder are read.

    Raises:
        OSError: the folder cannot be written to.
    """
    if not (folder / _COMMIT).is_dir():
        return
    try:
        with locked(folder, SAVE_LOCK, "is saving", wait=60):
            _finish(folder)
    except OSError as error:
        raise OSError(
            f"a save into {folder} was interrupted, and cannot be finished: {error}; copy the folder to where it can "
            "be written, and load it there"
        ) from error


def _finish(folder: Path) -> None:
    commit, new = folder / _COMMIT, folder / _COMMIT / "new"
    if not commit.is_dir():
        return
    if commit.is_symlink() or new.is_symlink():
        raise ValueError(f"{commit} is not a folder that a save left, but a link to elsewhere; delete it")
    coming = sorted(_files(new))
    obsolete = read_json(commit / _OBSOLETE)["obsolete"] if (commit / _OBSOLETE).is_file() else []
    for name in (*obsolete, *coming):
        place = folder / name
        if not place.parent.resolve().is_relative_to(folder.resolve()) or ".." in place.parts[len(folder.parts) :]:
            raise ValueError(f"{commit} is damaged: it names {name!r}, which is outside the folder; delete it")
    for name in (*obsolete, *coming):
        (folder / name).unlink(missing_ok=True)
    for name in coming:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / name, folder / name)
    for parent in {folder, *((folder / name).parent for name in coming)}:
        sync(parent)
    (commit / _OBSOLETE).unlink(missing_ok=True)
    shutil.rmtree(commit)


def _refuse_folder(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(f"{path} is a folder, and a file of this name is to be saved; move it away")
    if path.parent.exists() and not path.parent.is_dir():
        raise NotADirectoryError(f"{path.parent} is a file, and a folder of this name is to be saved; move it away")


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def model_folder(run: Path) -> Path:
    """The folder of the model of a run of `moeify train`; any other folder itself."""
    return run / "model" if (run / "model" / "config.json").is_file() else run
