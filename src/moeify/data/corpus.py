"""The default corpus: text from the installed packages of Python and torch, labelled by domain."""

import ast
import hashlib
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

Source = tuple[str, Callable[[], bytes]]
"""One file: the key that decides whether it is held out, and how to read it."""

MINIMUM = 100_000
"""Bytes below which a domain is skipped (or the cap, where that is smaller)."""

NOT_STDLIB = ("site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data")
"""Folders that are not the standard library itself."""


@dataclass(frozen=True)
class Corpus:
    """Text of several domains, split into a training and a validation part that share no file.

    Attributes:
        train: domain -> UTF-8 text.
        validation: domain -> UTF-8 text of the held-out files.
        sha256: the hash of both parts; it differs between versions of Python and torch.
        versions: what the text was taken from: `python`, `torch`.
        skipped: domain -> why it is not there.
    """

    train: dict[str, bytes]
    validation: dict[str, bytes]
    sha256: str
    versions: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        train, validation = (sum(map(len, part.values())) for part in (self.train, self.validation))
        lines = [
            f"{len(self.train)} domains ({', '.join(self.train)}), {train:,} bytes and {validation:,} held out",
            f"sha256 {self.sha256}, " + ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            *(f"skipped {domain}: {reason}" for domain, reason in self.skipped.items()),
        ]
        return "\n".join(lines)


def build_corpus(cap: int = 1_000_000) -> Corpus:
    """Read up to `cap` bytes of each domain, nine tenths to train on and one tenth held out, in files as a whole.

    A file is held out by the hash of its relative path, duplicates are taken once, and no file gives more than a
    tenth of `cap`, so that a full domain has ten files or more. The result depends on the installed versions
    alone. Licences come from every installed distribution.
    """
    train, validation, skipped = {}, {}, {}
    minimum = min(MINIMUM, cap)
    for domain, sources in _domains().items():
        parts = _read(sources, cap)
        if (size := sum(map(len, parts))) < minimum:
            skipped[domain] = f"{size:,} bytes on this machine, fewer than {minimum:,}"
        else:
            train[domain], validation[domain] = parts
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return Corpus(train, validation, _sha256(train, validation), versions, skipped)


def _domains() -> dict[str, Iterable[Source]]:
    stdlib, package = Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent
    return {
        "py-stdlib": _files(stdlib, ".py", skip=NOT_STDLIB),
        "py-tests": _files(stdlib / "test", ".py"),
        "py-torch": _files(package, ".py"),
        "cpp-headers": _files(package / "include", ".h"),
        "typing-stubs": _files(package, ".pyi"),
        "english-docs": _english(stdlib),
        "licences": _licences(package.parent),
    }


def _walk(folder: Path, skip: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield all files below `folder` in sorted order, lazily."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file():
            yield path
        elif path.name not in skip:
            yield from _walk(path, skip)


def _files(root: Path, suffix: str, skip: tuple[str, ...] = ()) -> Iterator[Source]:
    for path in _walk(root, skip):
        if path.suffix == suffix:
            yield path.relative_to(root).as_posix(), path.read_bytes


def _english(stdlib: Path) -> Iterator[Source]:
    """Yield the topics of `pydoc`, then the docstrings of each module, under the key that its code has."""
    from pydoc_data.topics import topics

    yield from ((f"topics/{name}", text.encode) for name, text in sorted(topics.items()))
    yield from ((key, lambda read=read: _docstrings(read())) for key, read in _files(stdlib, ".py", NOT_STDLIB))


def _docstrings(code: bytes) -> bytes:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = (node for node in ast.walk(ast.parse(code)) if isinstance(node, documented))
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes))).encode()


def _licences(site_packages: Path) -> Iterator[Source]:
    for folder in sorted(site_packages.glob("*.dist-info")):
        for path in _walk(folder):
            if path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE")):
                yield path.relative_to(site_packages).as_posix(), path.read_bytes


def _read(sources: Iterable[Source], cap: int) -> tuple[bytes, bytes]:
    """Return the train and the validation bytes; stop reading when both are full."""
    limits, parts, seen = (cap - cap // 10, cap // 10), (bytearray(), bytearray()), set()
    for key, read in sources:
        part = int(_held_out(key))
        if len(parts[part]) < limits[part]:
            text = read()[: cap // 10]
            if text not in seen:
                seen.add(text)
                parts[part].extend(text + b"\n")
        if all(len(part) >= limit for part, limit in zip(parts, limits, strict=True)):
            break
    train, validation = (_utf8(bytes(part[:limit])) for part, limit in zip(parts, limits, strict=True))
    return train, validation


def _held_out(key: str) -> bool:
    return hashlib.sha256(key.encode()).digest()[0] < 26  # of 256: a tenth


def _utf8(data: bytes) -> bytes:
    return data.decode("utf-8", "ignore").encode()


def _sha256(*parts: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for domain, text in part.items():
            digest.update(f"{domain} {len(text)}\n".encode() + text)
    return digest.hexdigest()
