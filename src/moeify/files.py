"""Read and write JSON and safetensors files: reading checks them, writing is atomic.

Only regular files are read, and links to them: a pipe would never end, and neither would `/dev/zero`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

HASHES = "SHA256.json"
"""Holds the fingerprint of every file that was saved with it in a folder."""
LARGEST_JSON = 2**28
"""Bytes of the largest JSON file that is read; no config, index or manifest comes near."""
DEEPEST_JSON = 100
"""The deepest nesting of JSON that is read; deeper nesting would exceed Python's recursion limit."""


def read_json(path: str | Path) -> dict[str, Any]:
    """The mapping that a JSON file holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not UTF-8, no mapping, no regular file, or more than is read.
        OSError: it cannot be read.
    """
    with _reading(path) as path:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"{path} has {size:,} bytes, and JSON of more than {LARGEST_JSON:,} is not read")
        content = path.read_bytes()
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping, not a {type(values).__name__}")
    if _depth(values) > DEEPEST_JSON:
        raise ValueError(f"{path} is not valid JSON: it is nested more than {DEEPEST_JSON} deep")
    return values


def _depth(values: dict[str, Any] | list[Any]) -> int:
    """How deep mappings and lists are nested, up to one more than is read."""
    level: list[Any] = [values]
    for depth in range(DEEPEST_JSON + 1):
        parts = (part for whole in level for part in (whole.values() if isinstance(whole, dict) else whole))
        level = [part for part in parts if isinstance(part, dict | list)]
        if not level:
            return depth
    return DEEPEST_JSON + 1


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, one of another format, or no regular file.
        OSError: it cannot be read.
    """
    from safetensors.torch import load_file

    with _reading_tensors(path) as path:
        return load_file(path)


def open_tensors(path: str | Path) -> Any:
    """A safetensors file with its header read, as `safetensors.safe_open` gives it: tensors are read one at a time.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, one of another format, or no regular file.
        OSError: it cannot be read.
    """
    from safetensors import safe_open

    with _reading_tensors(path) as path:
        return safe_open(path, framework="pt")


@contextmanager
def _reading_tensors(path: str | Path) -> Generator[Path]:
    from safetensors import SafetensorError

    with _reading(path) as path:
        try:
            yield path
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None


@contextmanager
def _reading(path: str | Path) -> Generator[Path]:
    """Context manager around reading a file; errors name the file."""
    path = regular(path)
    try:
        yield path
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error} while reading", str(path)) from None


def regular(path: str | Path) -> Path:
    """A path that is a regular file, or a link to one.

    Raises:
        FileNotFoundError: nothing is there, or a link to nothing.
        ValueError: a folder, a pipe, a device, or a name that no file can have.
        OSError: links in a circle, no permission, or a device that fails.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        what = f"{path.name} in {path.parent} is a link to nothing" if path.is_symlink() else None
        raise FileNotFoundError(what or f"there is no {path.name} in {path.parent}") from None
    except ValueError as error:  # a NUL in its name
        raise ValueError(f"no file can be called {str(path)!r}: {error}") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is a {'folder' if stat.S_ISDIR(mode) else 'pipe or device'}, not a file")
    return path


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8; a crash leaves the file unchanged.

    Bytes of a path that the locale could not decode are written as they are.
    """
    with replacing(path) as new:
        new.write_bytes(text.encode("utf-8", "surrogateescape"))


def write_json(path: str | Path, values: Any, **options: Any) -> None:
    """Write JSON, indented; a crash leaves the file unchanged.

    Args:
        path: where to.
        values: what `json.dumps` takes.
        options: further ones of `json.dumps`.
    """
    settings: dict[str, Any] = {"indent": 2} | options
    write_text(path, json.dumps(values, **settings) + "\n")


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors; a crash leaves the file unchanged, and equal tensors give equal bytes.

    Args:
        path: where to.
        tensors: by name.
        header: one entry of metadata; the order of several, and so the bytes, would be random.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as new:
        new.touch()
        permissions = new.stat().st_mode  # safetensors 0.8 writes files that only their owner reads
        try:
            save_file(ready, new, metadata=dict(header or {"format": "pt"}))
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from None
        new.chmod(permissions)


def share_tensors(folder: str | Path) -> None:
    """Give the safetensors files in a folder the permissions of a new file.

    safetensors 0.8 writes files that only their owner reads, whatever the umask.
    """
    new = Path(folder) / f".{uuid.uuid4().hex[:12]}.tmp"
    new.touch()
    permissions = new.stat().st_mode
    new.unlink()
    for file in Path(folder).glob("*.safetensors"):
        if file.stat().st_mode != permissions:
            file.chmod(permissions)


@contextmanager
def replacing(path: str | Path) -> Generator[Path]:
    """Give a path beside a file to write to; what was written takes the file's place once it is on disk.

    The folder is created if missing. An exception inside removes what was written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
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
    """The size of a file in `bytes`, and its `sha256`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no regular file.
        OSError: it cannot be read.
    """
    with _reading(path) as path, path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def unchanged(file: Path, saved: Mapping[str, Any] | None) -> Path:
    """Check that a file has the hash with which it was saved, and return its path.

    Args:
        file: its path.
        saved: `hashes_of` its folder; with None it passes.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it was damaged or changed, or is not listed.
        OSError: it cannot be read.
    """
    if saved is None:
        return file
    if not os.path.lexists(file):
        raise FileNotFoundError(f"there is no {file.name} in {file.parent}, though it was saved")
    if saved.get(file.name) != fingerprint(file):
        raise ValueError(
            f"{file} is damaged: it is not what was saved (SHA-256 differs from {HASHES}); copy it again from "
            f"where it came from, or, if you changed it yourself, delete {HASHES}"
        )
    return file


def hashes_of(folder: Path) -> dict[str, Any] | None:
    """What `SHA256.json` lists of its folder by name; None if there is none.

    Raises:
        ValueError: it is damaged, or of a later version.
        OSError: it cannot be read.
    """
    path = folder / HASHES
    if not os.path.lexists(path):
        return None
    content = read_json(path)
    if content.get("format") != 1:
        raise ValueError(
            f"{path} has the format {content.get('format')!r}, and this version of moeify reads format 1; update "
            "moeify, or delete the file to load unchecked"
        )
    files = content.get("files")
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise ValueError(f"{path} is damaged: it lists no files of its folder; delete it to load unchecked")
    return files
