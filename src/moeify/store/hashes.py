"""SHA-256 hashes of the files of a saved folder, stored in `SHA256.json` and verified before files are read."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeify.files import HASHES, fingerprint, hashes_of, unchanged, write_json
from moeify.folders import Stage, finish, replacing_files


@contextmanager
def saving(folder: str | Path, *, keep: bool = False) -> Generator[Stage]:
    """Yield a staging folder whose files replace those of `folder` in one transaction, with their hashes.

    Every subfolder has its own hashes. Files that are listed in the hashes of the last save and not written by this one
    are deleted; the attribute `obsolete` of the stage has their names and may be changed.

    Args:
        folder: the destination; created if missing.
        keep: keep the other files of the folder, with their hashes.

    Raises:
        ValueError: `keep` is True and the existing hashes are damaged.
        OSError: another process is saving there, the disk is full, or the folder cannot be written to.
    """
    folder = Path(folder)
    with replacing_files(folder) as stage:
        others = (hashes_of(folder) or {}) if keep else {}
        stage.obsolete |= set() if keep else listed_or_none(folder)
        yield stage
        for place in {path.parent for path in stage.new.rglob("*") if path.is_file()}:
            files = [path for path in place.iterdir() if path.is_file()]
            write_hashes(place, files, others if place == stage.new else {})


def write_hashes(folder: Path, files: Iterable[Path], others: dict[str, Any]) -> None:
    """Write the hashes of the files of a folder; `others` are known hashes of further files."""
    known = others | {file.name: fingerprint(file) for file in sorted(files)}
    write_json(folder / HASHES, {"format": 1, "files": known})


def verify(folder: str | Path) -> None:
    """Compare every file of a saved model, adapter or adapter library with its hash.

    Raises:
        FileNotFoundError: the folder has no hashes (earlier versions wrote none), or a file is missing.
        ValueError: a file was damaged or changed; the message names it.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    finish(folder)
    if not os.path.lexists(folder / HASHES):
        raise FileNotFoundError(
            f"there is no {HASHES} in {folder}, so its files cannot be verified; load the model and save it again"
        )
    check(folder)


def check(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Compare files with their hashes; folders without hashes, of earlier versions and of PEFT, are not checked.

    Args:
        folder: the folder with the hashes.
        files: the files to check; None for all that are listed.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file was damaged or changed, or is not listed.
        OSError: a file cannot be read.
    """
    saved = hashes_of(folder)
    for file in (folder / name for name in saved or {}) if files is None else files:
        unchanged(file, saved)


def listed_or_none(folder: Path) -> set[str]:
    """The names of the listed files and of the hash file; empty if the hashes are missing or damaged."""
    try:
        names = hashes_of(folder)
    except (ValueError, OSError):
        return set()
    return {*names, HASHES} if names else set()
