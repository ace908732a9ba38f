"""moeify's own trace as one safetensors file: a tensor per column, and a header in JSON beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from moeify.data.decompress import parse_json
from moeify.files import open_tensors, write_tensors
from moeify.inspect.formats.base import Format
from moeify.inspect.formats.header import check, columns_of, described, trace_of
from moeify.inspect.trace import Trace


def read(path: Path, *, num_experts: int | None = None, k: int | None = None) -> Trace:
    """The trace of a file.

    Raises:
        ValueError: damaged, or of a later version.
    """
    with open_tensors(path) as file:
        written = (file.metadata() or {}).get("moeify_trace", "null")
        try:
            header = parse_json(written, str(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: the header is not valid JSON: {error}") from None
        check(header, str(path))

        def of_table(number: int, said: dict[str, Any]) -> dict[str, Tensor]:
            return {name: _tensor(file, f"tokens.{number}.{name}") for name in said["columns"]}

        def of_layer(number: int, said: dict[str, Any]) -> dict[str, Tensor]:
            return {name: _tensor(file, f"layers.{number}.{name}") for name in said["columns"]}

        return trace_of(header, of_table, of_layer, str(path))


def _tensor(file: Any, name: str) -> Tensor:
    if name not in file.keys():  # noqa: SIM118 (it is no mapping)
        raise ValueError(f"the tensor {name} is not there")
    return file.get_tensor(name)


def write(trace: Trace, path: Path) -> None:
    """Write a trace; equal traces give equal bytes."""
    tensors = {
        f"tokens.{number}.{name}": column
        for number, table in enumerate(trace.tables)
        for name, column in table.columns.items()
    }
    for number, layer in enumerate(trace):
        tensors |= {f"layers.{number}.{name}": column for name, column in columns_of(layer).items()}
    own = {name: tensor.clone() for name, tensor in tensors.items()}  # columns of layers may be one tensor
    write_tensors(path, own, {"moeify_trace": json.dumps(described(trace))})


TENSORS = Format(
    name="safetensors", line="moeify's own, with everything: safetensors",
    endings=(".trace.safetensors", ".safetensors"), keeps=None,
    recognises=lambda path, head: head[8:9] == b"{" and b'"moeify_trace"' in head, read=read, write=write,
)  # fmt: skip
