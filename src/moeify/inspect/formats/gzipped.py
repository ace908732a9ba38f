"""Text files that may be compressed with gzip: read their first bytes, and open them for writing."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from moeify.files import regular


def first_bytes(path: Path, size: int = 4096) -> bytes:
    """The first bytes of a file, decompressed if it is gzip.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no regular file, or damaged gzip.
    """
    with regular(path).open("rb") as file:
        head = file.read(size)
    if not head.startswith(b"\x1f\x8b"):
        return head
    try:
        with gzip.open(path) as file:
            return file.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be decompressed ({error}); the file is damaged") from None


@contextmanager
def open_to_write(new: Path, path: Path) -> Generator[TextIO]:
    """Open a text file for writing, compressed if the name of `path`, which it will have, ends with `.gz`."""
    if path.suffix.lower() != ".gz":
        with new.open("w", encoding="utf-8", newline="") as file:
            yield file
        return
    with (
        new.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as packed,
        TextIOWrapper(packed, encoding="utf-8", newline="") as file,
    ):
        yield file
