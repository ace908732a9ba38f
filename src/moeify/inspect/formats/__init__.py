"""File formats of traces: moeify's own, and those of Megatron-LM, llama.cpp, BigMoeOnEdge and vLLM, one file each."""

from __future__ import annotations

from pathlib import Path

from moeify.inspect.formats.base import Format
from moeify.inspect.formats.bigmoeonedge import BIGMOEONEDGE
from moeify.inspect.formats.gzipped import first_bytes
from moeify.inspect.formats.lines import LINES
from moeify.inspect.formats.llama_cpp import LLAMA_CPP
from moeify.inspect.formats.megatron import MEGATRON
from moeify.inspect.formats.tensors import TENSORS
from moeify.inspect.formats.vllm import VLLM
from moeify.inspect.trace import Trace
from moeify.notices import notify
from moeify.registry import suggest

__all__ = [
    "Format",
    "find_format",
    "format_names",
    "format_to_write",
    "read_trace",
    "recognised",
    "register_format",
    "write_trace",
]

_FORMATS = {f.name: f for f in (TENSORS, LINES, MEGATRON, LLAMA_CPP, BIGMOEONEDGE, VLLM)}


def register_format(new: Format) -> None:
    """Register a format, for `read_trace`, `write_trace` and the command line.

    Raises:
        ValueError: the name is taken.
    """
    if _FORMATS.setdefault(new.name, new) is not new:
        raise ValueError(f"a format of traces is called {new.name!r} already; choose another name")


def format_names() -> list[str]:
    """The names of all formats."""
    return list(_FORMATS)


def find_format(name: str) -> Format:
    """The format with this name.

    Raises:
        ValueError: no format has this name.
    """
    if name not in _FORMATS:
        raise ValueError(f"no format of traces is called {name!r}; {suggest(name, format_names())}")
    return _FORMATS[name]


def recognised(path: str | Path) -> Format | None:
    """The format of a file, or of a folder of Megatron-LM, by its content; None if it is not a trace.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a pipe or device, or damaged gzip.
    """
    path = Path(path)
    head = b"" if path.is_dir() else first_bytes(path)
    return next((f for f in _FORMATS.values() if f.recognises(path, head)), None)


def read_trace(
    path: str | Path, format: str | None = None, *, num_experts: int | None = None, k: int | None = None
) -> Trace:
    """The trace of a file, in the format that its content shows.

    Args:
        path: the file, or a folder of Megatron-LM.
        format: the name of the format, to allow no other.
        num_experts: E, for formats that do not store it; by default one more than the largest expert index.
        k: experts per token, for llama.cpp's; by default it follows from the order of rows.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file of no known format, or a damaged one; the message names file and line.
    """
    path = Path(path)
    found = recognised(path) if format is None else find_format(format)
    if found is None:
        raise ValueError(f"{path} is not a trace in a known format ({', '.join(format_names())})")
    return found.read(path, num_experts=num_experts, k=k)


def write_trace(trace: Trace, path: str | Path, format: str | None = None) -> None:
    """Write a trace in a format, by default that of the file's extension; print which columns it cannot store.

    Raises:
        ValueError: an unknown format or extension, or a trace that the format cannot hold.
    """
    path = Path(path)
    found = format_to_write(path, format)
    if lost := found.lost(trace):
        notify(f"{path.name}: the format {found.name} cannot store {', '.join(lost)}, which are not written")
    found.write(trace, path)


def format_to_write(path: Path, format: str | None = None) -> Format:
    """The format that a file is written in: that of its extension, unless one is named.

    Raises:
        ValueError: an unknown format or extension.
    """
    if format is not None:
        return find_format(format)
    fits = [(len(end), f) for f in _FORMATS.values() for end in f.endings if path.name.lower().endswith(end)]
    if not fits:
        endings = ", ".join(f"{f.endings[0]} ({f.name})" for f in _FORMATS.values())
        raise ValueError(f"{path.name} has no ending of a format of traces: {endings}; or name the format")
    return max(fits, key=lambda fit: fit[0])[1]
