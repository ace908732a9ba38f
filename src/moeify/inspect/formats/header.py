"""The header of moeify's own traces, in safetensors and in JSONL: tables, layers and what their columns are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from moeify.inspect.trace import LayerTrace, Tokens, Trace

VERSION = 1


def columns_of(layer: LayerTrace) -> dict[str, Tensor]:
    """The columns of a layer by name; those of a single format are called `extra.NAME`."""
    return layer.columns | {f"extra.{name}": values for name, values in layer.extra.items()}


def described(trace: Trace) -> dict[str, Any]:
    """The facts of a trace other than its columns, in plain values."""
    tables = trace.tables
    number = {id(table): place for place, table in enumerate(tables)}
    return {
        "moeify_trace": VERSION,
        "header": trace.header,
        "tables": [
            {
                "count": len(table), "columns": list(table.columns), "domains": list(table.domains),
                "modalities": list(table.modalities), "vocabulary": {str(i): t for i, t in table.vocabulary.items()},
            }
            for table in tables
        ],
        "layers": [
            {
                "name": layer.name, "num_experts": layer.num_experts, "table": number[id(layer.tokens)],
                "columns": {name: [str(v.dtype), v.shape[1]] for name, v in columns_of(layer).items()},
            }
            for layer in trace
        ],
    }  # fmt: skip


def check(header: Any, where: str) -> None:
    """Refuse anything but a header of this version.

    Raises:
        ValueError: it is not one.
    """
    if not isinstance(header, dict) or "moeify_trace" not in header:
        raise ValueError(f"{where}: it has no header of a trace of moeify")
    if header["moeify_trace"] != VERSION:
        raise ValueError(
            f"{where} is a trace of version {header['moeify_trace']!r}, and this moeify reads {VERSION}; update "
            "moeify, or record it again"
        )
    kinds = {"header": dict, "tables": list, "layers": list}
    if wrong := [name for name, kind in kinds.items() if not isinstance(header.get(name), kind)]:
        raise ValueError(f"{where}: the header is damaged: it has no {' and no '.join(wrong)}")


def trace_of(
    header: dict[str, Any],
    of_table: Callable[[int, dict[str, Any]], Mapping[str, Tensor]],
    of_layer: Callable[[int, dict[str, Any]], Mapping[str, Tensor]],
    where: str,
) -> Trace:
    """The trace that a header describes.

    Args:
        header: the header, after `check`.
        of_table: the columns of a table, by its number and its entry in the header.
        of_layer: the columns of a layer.
        where: the name of the file.

    Raises:
        ValueError: the header is damaged, or columns do not fit it.
    """
    try:
        tables = [
            Tokens(
                said["count"], domains=tuple(said["domains"]), modalities=tuple(said["modalities"]),
                vocabulary={int(i): text for i, text in said["vocabulary"].items()}, **of_table(number, said),
            )
            for number, said in enumerate(header["tables"])
        ]  # fmt: skip
        layers = {}
        for number, said in enumerate(header["layers"]):
            found = of_layer(number, said)
            extra = {name.removeprefix("extra."): v for name, v in found.items() if name.startswith("extra.")}
            columns: dict[str, Any] = {name: v for name, v in found.items() if not name.startswith("extra.")}
            layers[said["name"]] = LayerTrace(
                name=said["name"], num_experts=said["num_experts"], tokens=tables[said["table"]], extra=extra, **columns
            )
        return Trace(layers=layers, header=header["header"])
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{where} is damaged: header and columns do not fit ({type(error).__name__}: {error})"
        ) from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
