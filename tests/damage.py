"""Everything that may happen to a file of a folder, one after the other, each undone before the next."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


def cut(path: Path, content: bytes, other: bytes) -> None:
    path.write_bytes(content[: len(content) // 2])


def flip(path: Path, content: bytes, other: bytes) -> None:
    middle = len(content) * 2 // 3
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def swap(path: Path, content: bytes, other: bytes) -> None:
    path.write_bytes(other)


DAMAGES: dict[str, Callable[[Path, bytes, bytes], object]] = {
    "deleted": lambda path, content, other: None,
    "empty": lambda path, content, other: path.touch(),
    "cut": cut,
    "a bit flipped": flip,
    "swapped": swap,
    "NUL bytes": lambda path, content, other: path.write_bytes(bytes(len(content))),
    "nested deeply": lambda path, content, other: path.write_bytes(b"[" * 100_000),
    "a folder": lambda path, content, other: path.mkdir(),
}
if sys.platform != "win32":
    DAMAGES |= {
        "a link to nothing": lambda path, content, other: path.symlink_to("nothing"),
        "a link to itself": lambda path, content, other: path.symlink_to(path.name),
        "a link to a folder": lambda path, content, other: path.symlink_to(path.parent),
        "a pipe": lambda path, content, other: os.mkfifo(path),
        "a link without an end": lambda path, content, other: path.symlink_to("/dev/zero"),
    }


def damaged(folder: Path, other: Path, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Name every file of a folder and what is done to it, while it is done.

    Args:
        folder: is as it was afterwards.
        other: a folder of the same kind, from which a file is swapped in.
        skip: files that are left alone.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        path = folder / name
        content, theirs = path.read_bytes(), (other / name).read_bytes()
        for what, do in DAMAGES.items():
            if name in skip or (what == "swapped" and theirs == content):
                continue
            path.unlink()
            do(path, content, theirs)
            try:
                yield name, what
            finally:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
                path.write_bytes(content)
