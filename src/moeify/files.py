"""Read and write JSON and safetensors files: reading checks them, writing is atomic."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor


def read_json(path: str | Path) -> dict[str, Any]:
    """The mapping that a JSON file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not UTF-8, or no mapping.
    """
    path = _present(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping, not a {type(values).__name__}")
    return values


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one of another format.
    """
    from safetensors.torch import load_file

    with _translated(path) as path:
        return load_file(path)


def open_tensors(path: str | Path) -> Any:
    """A safetensors file with its header read, as `safetensors.safe_open` gives it: tensors are read one at a time.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one of another format.
    """
    from safetensors import safe_open

    with _translated(path) as path:
        return safe_open(path, framework="pt")


@contextmanager
def _translated(path: str | Path) -> Iterator[Path]:
    from safetensors import SafetensorError

    path = _present(path)
    try:
        yield path
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None


def _present(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}")
    return path


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8; a crash leaves the file as it was."""
    with replacing(path) as new:
        new.write_bytes(text.encode("utf-8"))


def write_json(path: str | Path, values: Any, **options: Any) -> None:
    """Write JSON, indented; a crash leaves the file as it was.

    Args:
        path: where to.
        values: what `json.dumps` takes.
        options: further ones of `json.dumps`.
    """
    settings: dict[str, Any] = {"indent": 2} | options
    write_text(path, json.dumps(values, **settings) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors; a crash leaves the file as it was, and equal tensors give equal bytes.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as new:
        try:
            save_file(ready, new, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path beside a file to write to; what was written takes the file's place once it is on disk.

    The folder is made if it is not there. An exception inside removes what was written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield new
        sync(new)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk; Windows opens no folders and writes to them at once."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fingerprint(path: Path) -> dict[str, Any]:
    """The size of a file in `bytes`, and its `sha256`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
