"""moeify's own trace as JSONL: a header in the first line, and then a line for every token of every table.

    {"table": 0, "tokens": {"ids": 17, "position": 0}, "layers": [{"experts": [5, 2], "weights": [0.7, 0.3]}, ...]}

The layers of a line are those of its table, in the order of the header.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify.data.decompress import parse_json, read_text
from moeify.files import replacing
from moeify.inspect.formats.base import Format
from moeify.inspect.formats.gzipped import open_to_write
from moeify.inspect.formats.header import check, columns_of, described, trace_of
from moeify.inspect.trace import COLUMNS, Trace

Line = tuple[int, dict[str, Any]]
"""The number and the content of a line."""


def read(path: Path, *, num_experts: int | None = None, k: int | None = None) -> Trace:
    """The trace of a file.

    Raises:
        ValueError: the file is damaged (the message names the line), or its format is of another version.
    """
    written = read_text(path).splitlines()
    header = _parsed(written[0] if written else "", path, 1)
    check(header, f"{path}, line 1")
    lines: dict[int, list[Line]] = {}
    for number, text in enumerate(written[1:], 2):
        line = _parsed(text, path, number)
        if not isinstance(line, dict) or line.keys() != {"table", "tokens", "layers"}:
            raise ValueError(f"{path}, line {number}: no token, which has table, tokens and layers")
        lines.setdefault(line["table"], []).append((number, line))

    def of_table(number: int, said: dict[str, Any]) -> dict[str, Tensor]:
        mine = lines.get(number, [])
        return {name: _column(mine, ("tokens", name), COLUMNS[name]) for name in said["columns"]}

    def of_layer(number: int, said: dict[str, Any]) -> dict[str, Tensor]:
        mine = lines.get(said["table"], [])
        place = [other["table"] for other in header["layers"][:number]].count(said["table"])
        columns = said["columns"].items()
        return {
            name: _column(mine, ("layers", place, name), _kind(kind)).view(len(mine), width)
            for name, (kind, width) in columns
        }

    return trace_of(header, of_table, of_layer, str(path))


def _parsed(text: str, path: Path, number: int) -> Any:
    try:
        return parse_json(text, str(path), number)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from None


_DAMAGE = (KeyError, IndexError, TypeError, ValueError, RuntimeError, OverflowError)


def _column(lines: list[Line], where: tuple[str | int, ...], kind: torch.dtype) -> Tensor:
    """One entry of every line as a column; an entry that differs in shape from the first is refused by its line."""
    try:
        return torch.tensor([_at(line, where) for _, line in lines], dtype=kind)
    except _DAMAGE:
        for number, line in lines:
            try:
                torch.tensor([_at(lines[0][1], where), _at(line, where)], dtype=kind)
            except _DAMAGE as error:
                raise ValueError(f"line {number} is damaged ({type(error).__name__}: {error})") from None
        raise


def _at(line: dict[str, Any], where: tuple[str | int, ...]) -> Any:
    found: Any = line
    for key in where:
        found = found[key]
    return found


def _kind(name: str) -> torch.dtype:
    kind = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"there is no type {name!r}")
    return kind


def write(trace: Trace, path: Path) -> None:
    """Write a trace, compressed if the file's name ends with `.gz`."""
    with replacing(path) as new, open_to_write(new, path) as file:
        file.write(json.dumps(described(trace)) + "\n")
        file.writelines(json.dumps(line) + "\n" for line in _lines(trace))


def _lines(trace: Trace) -> Iterator[dict[str, Any]]:
    for number, table in enumerate(trace.tables):
        tokens = {name: column.tolist() for name, column in table.columns.items()}
        layers = [
            {name: values.tolist() for name, values in columns_of(layer).items()}
            for layer in trace
            if layer.tokens is table
        ]
        for row in range(len(table)):
            yield {
                "table": number,
                "tokens": {name: column[row] for name, column in tokens.items()},
                "layers": [{name: values[row] for name, values in layer.items()} for layer in layers],
            }


LINES = Format(
    name="jsonl", line="moeify's own, with everything: JSONL, a line per token",
    endings=(".trace.jsonl", ".trace.jsonl.gz", ".jsonl.gz"), keeps=None,
    recognises=lambda path, head: head.startswith(b'{"moeify_trace"'), read=read, write=write,
)  # fmt: skip
