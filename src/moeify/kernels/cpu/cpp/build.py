"""Load the C++ kernels: those of the wheel, or those of the cache, or compiled now by the system's compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from moeify import env
from moeify.files import sync
from moeify.folders import locked
from moeify.kernels.cpu.cpp.compiler import FLAGS, LEVELS, PREBUILT, compile_, name, run, short_hash

_UNFINISHED = "compiling-"
_WAIT = 600.0  # seconds for the process that compiles
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
        "avx512_vnni": wide and torch.cpu._is_vnni_supported(),
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
    """The instruction set of the kernels on this machine and where they are from, or why there are none."""
    if reason := why_not():
        return f"none: {reason}"
    return f"{level()}, {'from the wheel' if Path(library()._name).parent == PREBUILT else 'compiled here'}"


def library() -> ctypes.CDLL:
    """The compiled kernels for the setting `MOEIFY_CPP`: `0` for none, a key of `LEVELS`, or `1` for the fastest.

    Raises:
        Unavailable: the kernels are disabled, the processor lacks the level, there is no compiler, or it fails.
        ValueError: `MOEIFY_CPP` has any other value.
    """
    outcome = _load(level(), os.environ.get("CXX"), tuple(env.CXXFLAGS.words))
    if isinstance(outcome, str):
        raise Unavailable(outcome)
    return outcome


def level() -> str:
    """The instruction set that `MOEIFY_CPP` asks for.

    Raises:
        Unavailable: the kernels are disabled, or the processor lacks it.
        ValueError: `MOEIFY_CPP` has any other value.
    """
    setting = env.CPP.value
    if setting == "0":
        raise Unavailable("it is switched off by MOEIFY_CPP=0")
    if setting != "1" and setting not in levels():
        raise Unavailable(f"MOEIFY_CPP={setting} is not among those of this processor: {', '.join(levels())}")
    return levels()[0] if setting == "1" else setting


@functools.cache
def _load(level: str, chosen: str | None, options: tuple[str, ...] = ()) -> ctypes.CDLL | str:
    """The library for one instruction set, or the reason why there is none; tried once per process."""
    if not chosen and not options and (prebuilt := _prebuilt(level)):
        return prebuilt
    compiler = next(
        (path for name in ([chosen] if chosen else ["c++", "g++", "clang++"]) if (path := _find(name))), None
    )
    try:
        file = _compiled(level, compiler, options) if compiler else None if chosen else _cached(level)
        if file is None:
            tried = f"CXX={chosen} is not found" if chosen else "none of c++, g++ and clang++ is found"
            return f"it is compiled at first use and {tried}; install a C++ compiler or set CXX"
        return ctypes.CDLL(str(file))
    except PermissionError as error:
        return f"its cache cannot be used: {error}"
    except Exception as error:  # any failure: without the kernels, torch computes the same
        how = f"compiled by {' '.join(compiler)}" if compiler else "taken from its cache"
        return f"it could not be {how}: {_end_of_output(error)}"


def _prebuilt(level: str) -> ctypes.CDLL | None:
    """The library that the wheel brings, None if it has none of these sources, or one that this system cannot load."""
    file = PREBUILT / f"{name(level)}.so"
    try:
        return ctypes.CDLL(str(file)) if file.exists() else None
    except OSError as error:
        logging.getLogger(__name__).warning("%s cannot be loaded, so the kernels are compiled: %s", file, error)
        return None


def _find(command: str) -> list[str] | None:
    """The words of a command, None if its program is not found."""
    words = command.split()
    return words if words and shutil.which(words[0]) else None


def _compiled(level: str, compiler: list[str], options: Sequence[str] = ()) -> Path:
    """The compiled library; processes that want it at the same time wait for the one that compiles it."""
    folder, version = _folder(), short_hash(repr((run([*compiler, "--version"]), compiler, *options)).encode())
    file = folder / f"{name(level)}-{version}.so"
    if not _is_whole(file):
        with locked(folder, f"{file.name}.lock", "is compiling", wait=_WAIT):
            if not _is_whole(file):
                _compile([*compiler, *FLAGS, *LEVELS[level], *options], file)
    _must_be_trusted(file)
    return file


def _compile(command: list[str], file: Path) -> None:
    """Compile a library; it replaces another of its name at once."""
    logging.getLogger(__name__).info("compiling %s; this takes some seconds, once", file)
    _sweep(file.parent)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=_UNFINISHED) as here:
        made, written = Path(here) / file.name, Path(here) / _digest_of(file).name
        compile_(command, made)
        made.chmod(0o755)
        written.write_bytes(_digest(made))
        for whole in (made, written):
            sync(whole)
        written.replace(_digest_of(file))
        made.replace(file)


def _cached(level: str) -> Path | None:
    """A library that any compiler wrote to the cache, None if there is none; for machines without a compiler."""
    found = next((file for file in sorted(_folder().glob(f"{name(level)}-*.so")) if _is_whole(file)), None)
    if found is not None:
        _must_be_trusted(found)
    return found


def _folder() -> Path:
    folder = env.cache_folder() / "cpp"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _must_be_trusted(folder)
    return folder


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


def _end_of_output(error: Exception) -> str:
    output = getattr(error, "stderr", None) or str(error)
    lines = output.strip().splitlines() or [str(error)]
    return next((line for line in lines if "error" in line), lines[-1])
