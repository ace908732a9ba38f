"""SHA-256 of the files of a saved folder, written beside them and compared before they are read: `SHA256.json`."""

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
    """Give a folder to write files into, which take their places in `folder` together, with their hashes.

    Every folder in it gets hashes of its own. Files that the hashes of the last save list, and this save does not
    write, are deleted; `obsolete` of the result holds their names, to be changed.

    Args:
        folder: where the files go; made if it is not there.
        keep: let the other files of the folder stay, with the hashes that they have.

    Raises:
        ValueError: the other files stay, and their hashes are damaged.
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
    """Write what the files of a folder are at this moment; `others` are those of which it is known already."""
    known = others | {file.name: fingerprint(file) for file in sorted(files)}
    write_json(folder / HASHES, {"format": 1, "files": known})


def verify(folder: str | Path) -> None:
    """Compare every file of a saved model, adapter or adapter library with what was saved.

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
    """Compare the files that are about to be read; folders without hashes, of earlier versions and of PEFT, pass.

    Args:
        folder: with the hashes.
        files: None for those that are listed.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file was damaged or changed, or is not listed.
        OSError: a file cannot be read.
    """
    saved = hashes_of(folder)
    for file in (folder / name for name in saved or {}) if files is None else files:
        unchanged(file, saved)


def listed_or_none(folder: Path) -> set[str]:
    """What hashes list, and the hashes; nothing if they are damaged, for then it is not known whose files these are."""
    try:
        names = hashes_of(folder)
    except (ValueError, OSError):
        return set()
    return {*names, HASHES} if names else set()
