"""Compile the C++ kernels at first use with the system's compiler, cache them on disk, and load them."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from moeify import env
from moeify.files import sync

LEVELS: dict[str, list[str]] = {
    "avx512_bf16": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "neon": [],
    "portable": [],
}
"""The supported instruction sets, fastest first, and their compiler flags."""

_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-w"]
_SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))

_UNFINISHED = "compiling-"
_OWN_FOLDER = "set MOEIFY_CACHE to a folder of your own"


class Unavailable(RuntimeError):
    """The C++ kernels are not available on this machine; the message has the reason."""


@functools.cache
def levels() -> list[str]:
    """The instruction sets that this processor supports, fastest first."""
    has = torch.backends.cpu.get_cpu_capability()
    wide = has.startswith("AVX512")
    runs = {
        "avx512_bf16": wide and torch.cpu._is_avx512_bf16_supported(),
        "avx512": wide,
        "avx2": wide or has == "AVX2",
        "neon": platform.machine() in ("aarch64", "arm64"),
        "portable": True,
    }
    return [level for level in LEVELS if runs[level]]


def why_not() -> str | None:
    """The reason why the kernels are unavailable, None if they are available; compiles them if needed."""
    try:
        library()
    except Unavailable as reason:
        return str(reason)
    return None


def explain() -> str:
    """The instruction set of the kernels on this machine, or why there are none; compiles them if needed."""
    return f"none: {reason}" if (reason := why_not()) else _level()


def library() -> ctypes.CDLL:
    """The compiled kernels for the setting `MOEIFY_CPP`: `0` for none, a key of `LEVELS`, or `1` for the fastest.

    Raises:
        Unavailable: the kernels are disabled, the processor lacks the level, there is no compiler, or it fails.
        ValueError: `MOEIFY_CPP` has any other value.
    """
    outcome = _load(_level(), os.environ.get("CXX"))
    if isinstance(outcome, str):
        raise Unavailable(outcome)
    return outcome


def _level() -> str:
    setting = env.CPP.value
    if setting == "0":
        raise Unavailable("it is switched off by MOEIFY_CPP=0")
    if setting != "1" and setting not in levels():
        raise Unavailable(f"MOEIFY_CPP={setting} is not among those of this processor: {', '.join(levels())}")
    return levels()[0] if setting == "1" else setting


@functools.cache
def _load(level: str, chosen: str | None) -> ctypes.CDLL | str:
    """The library for one instruction set, or the reason why there is none; tried once per process."""
    compiler = next(
        (path for name in ([chosen] if chosen else ["c++", "g++", "clang++"]) if (path := _find(name))), None
    )
    try:
        file = _compiled(level, compiler) if compiler else None if chosen else _cached(level)
        if file is None:
            tried = f"CXX={chosen} is not found" if chosen else "none of c++, g++ and clang++ is found"
            return f"it is compiled at first use and {tried}; install a C++ compiler or set CXX"
        return ctypes.CDLL(str(file))
    except PermissionError as error:
        return f"its cache cannot be used: {error}"
    except Exception as error:  # any failure: without the kernels, torch computes the same
        how = f"compiled by {' '.join(compiler)}" if compiler else "taken from its cache"
        return f"it could not be {how}: {_end_of_output(error)}"


def _find(command: str) -> list[str] | None:
    """The words of a command, None if its program is not found."""
    words = command.split()
    return words if words and shutil.which(words[0]) else None


def _compiled(level: str, compiler: list[str]) -> Path:
    """The compiled library; the file is replaced atomically, so that several processes may compile it concurrently."""
    folder, version = _folder(), _short_hash(repr((_run([*compiler, "--version"]), compiler)).encode())
    file = folder / f"{_name(level)}-{version}.so"
    if not _is_whole(file):
        logging.getLogger(__name__).info("compiling %s; this takes some seconds, once", file)
        _sweep(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=_UNFINISHED) as here:
            made, written = Path(here) / file.name, Path(here) / _digest_of(file).name
            _compile([*compiler, *_FLAGS, *LEVELS[level]], made)
            made.chmod(0o755)
            written.write_bytes(_digest(made))
            for whole in (made, written):
                sync(whole)
            written.replace(_digest_of(file))
            made.replace(file)
    _must_be_trusted(file)
    return file


def _cached(level: str) -> Path | None:
    """A library that any compiler wrote to the cache, None if there is none; for machines without a compiler."""
    found = next((file for file in sorted(_folder().glob(f"{_name(level)}-*.so")) if _is_whole(file)), None)
    if found is not None:
        _must_be_trusted(found)
    return found


def _folder() -> Path:
    folder = env.cache_folder() / "cpp"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _must_be_trusted(folder)
    return folder


def _name(level: str) -> str:
    """The prefix of the file name: a hash of sources, processor and flags, without the compiler."""
    content = b"\0".join(path.read_bytes() for path in _SOURCES)
    return f"layer-{level}-{_short_hash(repr((platform.machine(), LEVELS[level], _FLAGS)).encode() + content)}"


def _sweep(folder: Path) -> None:
    """Remove temporary folders of killed compilations: those older than an hour."""
    for left in folder.glob(f"{_UNFINISHED}*"):
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)


def _is_whole(file: Path) -> bool:
    """Whether a library exists and matches its SHA-256: loading a truncated one would crash the process."""
    digest = _digest_of(file)
    return file.exists() and digest.exists() and _digest(file) == digest.read_bytes()


def _digest_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.sha256")


def _digest(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).hexdigest().encode()


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _must_be_trusted(path: Path) -> None:
    """Reject a path that another user can write to: a library runs with the permissions of this user.

    Raises:
        PermissionError: the file or folder belongs to another user, root excepted, or others may write to it.
    """
    if os.name == "nt":
        return
    status = path.stat()
    if status.st_uid not in (0, os.getuid()):
        raise PermissionError(f"{path} belongs to another user, who could run code here; {_OWN_FOLDER}")
    if status.st_mode & 0o022:
        raise PermissionError(f"others may write to {path}, and could run code here; chmod go-w it, or {_OWN_FOLDER}")


def _compile(command: list[str], made: Path) -> None:
    """Compile all translation units in parallel, with OpenMP where the compiler supports it, and link them."""
    units = {str(path): str(made.with_name(f"{path.stem}.o")) for path in _SOURCES if path.suffix == ".cpp"}

    def unit(source: str) -> None:
        _with_openmp([*command, "-c", source, "-o", units[source]])

    with ThreadPoolExecutor() as pool:
        list(pool.map(unit, units))
    _with_openmp([*command, "-shared", *units.values(), "-o", str(made)])


def _with_openmp(command: list[str]) -> None:
    try:
        _run([*command, "-fopenmp"])
    except subprocess.CalledProcessError:
        _run(command)


def _run(command: list[str]) -> str:
    """The standard output of a command; undecodable bytes are replaced."""
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=True)
    return done.stdout


def _end_of_output(error: Exception) -> str:
    output = getattr(error, "stderr", None) or str(error)
    lines = output.strip().splitlines() or [str(error)]
    return next((line for line in lines if "error" in line), lines[-1])
