"""Compile the C++ kernels for one instruction set; needs Python alone, since wheels are built by it too."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LEVELS: dict[str, list[str]] = {
    "avx512_bf16": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"],
    "avx512_vnni": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "neon": [],
    "portable": [],
}
"""The supported instruction sets, fastest first, and their compiler flags."""

PREBUILT = Path(__file__).parent / "prebuilt"
"""The folder of the libraries that a wheel for one platform brings, `name(level).so`."""

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-w"]
SOURCES = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cpp", ".h"))


def name(level: str) -> str:
    """The prefix of the file name: a hash of sources, processor and flags, without the compiler."""
    content = b"\0".join(path.read_bytes() for path in SOURCES)
    return f"layer-{level}-{short_hash(repr((platform.machine(), LEVELS[level], FLAGS)).encode() + content)}"


def short_hash(content: bytes) -> str:
    """Sixteen digits of a SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def compile_(command: list[str], made: Path) -> None:
    """Compile all translation units in parallel, with OpenMP where the compiler supports it, and link them."""
    units = {str(path): str(made.with_name(f"{path.stem}.o")) for path in SOURCES if path.suffix == ".cpp"}

    def unit(source: str) -> None:
        _with_openmp([*command, "-c", source, "-o", units[source]])

    with ThreadPoolExecutor() as pool:
        list(pool.map(unit, units))
    _with_openmp([*command, "-shared", *units.values(), "-o", str(made)])


def _with_openmp(command: list[str]) -> None:
    try:
        run([*command, "-fopenmp"])
    except subprocess.CalledProcessError:
        run(command)


def run(command: list[str]) -> str:
    """The standard output of a command; undecodable bytes are replaced."""
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=True)
    return done.stdout
