"""The route trace of BigMoeOnEdge: CSV, one row per turn, step, layer and slot, with the bytes read from disk for it.

https://github.com/Helldez/BigMoeOnEdge, pull request 21. A step is a token, numbered from the prompt through decoding.
Lines before the heading name the model and the bytes of every layer's experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moeify.data.decompress import read_text
from moeify.files import replacing
from moeify.inspect.formats.base import Format, Rows, by_number, passes, whole
from moeify.inspect.formats.gzipped import open_to_write
from moeify.inspect.formats.table import parse_rows
from moeify.inspect.trace import DECODE, PREFILL, LayerTrace, Tokens, Trace

FIRST = "# route_trace v1"
_COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert", "weight", "residency", "expert_bytes")
_EXTRA = ("residency", "expert_bytes")
_OF_LAYER = ("expert_bytes", "dense_bytes")


def read(path: Path, *, num_experts: int | None = None, k: int | None = None) -> Trace:
    """The trace of a file; its first lines become the header.

    Raises:
        ValueError: damaged; the message names file and line.
    """
    lines = read_text(path).splitlines()
    header, start = _header(lines, str(path))
    column = parse_rows(lines[start:], _COLUMNS, str(path), first_line=start + 1, fraction="weight")
    line = torch.arange(start + 1, len(lines) + 1)
    if (wrong := column["phase"] > DECODE).any():
        raise ValueError(f"{path}, line {int(line[wrong][0])}: the phase is neither {PREFILL} nor {DECODE}")
    key, place = (column["turn"] * 2**32 + column["step"]).unique(return_inverse=True)
    turn, step = key // 2**32, key % 2**32
    phase = torch.full((len(key),), PREFILL).index_put((place,), column["phase"])
    if not torch.equal(phase[place], column["phase"]):
        first = int(line[phase[place] != column["phase"]][0])
        raise ValueError(f"{path}, line {first}: a token is of the prompt here and decoded elsewhere")
    table = Tokens(
        len(key), sequence=turn, position=step, phase=phase, step=_steps(turn, phase),
        batch=torch.zeros_like(turn),
    )  # fmt: skip
    rows = Rows(
        token=place, layer=column["layer"], slot=column["slot"], expert=column["expert"], line=line,
        values={
            "weights": column["weight"], "residency": column["residency"].to(torch.int8),
            "expert_bytes": column["expert_bytes"],
        },
    )  # fmt: skip
    known = header["run"].get("n_expert")
    experts = num_experts if known is None else whole(known, str(path), "n_expert")
    return Trace(layers=rows.layers(table, experts, str(path)), header=header)


def _steps(turn: Tensor, phase: Tensor) -> Tensor:
    """Steps of decoding, counted in every turn; the prompt is 0."""
    decoded = (phase == DECODE).long()
    before = torch.zeros(int(turn.max()) + 2, dtype=torch.long).index_add(0, turn + 1, decoded).cumsum(0)
    return torch.where(phase == DECODE, decoded.cumsum(0) - before[turn], 0)


def _header(lines: list[str], where: str) -> tuple[dict[str, Any], int]:
    """The facts in the lines before the rows, and the number of those lines."""
    if not lines or lines[0].strip() != FIRST:
        raise ValueError(f"{where}, line 1: not {FIRST!r}; only version 1 is known")
    run: dict[str, str] = {}
    layers: dict[str, dict[str, int]] = {}
    for number, line in enumerate(lines[1:], 2):
        if not line.startswith("#"):
            if line.split(",") != list(_COLUMNS):
                raise ValueError(f"{where}, line {number}: the heading is not {','.join(_COLUMNS)}")
            return {"model": run.get("model", ""), "format": "bigmoeonedge", "run": run, "bytes": layers}, number
        said = dict(re.findall(r"(\w+)=(.*?)(?= \w+=|$)", line))
        if "layer" in said:
            what = f"{where}, line {number}"
            layers[f"layers.{said['layer']}"] = {name: whole(said.get(name, ""), what, name) for name in _OF_LAYER}
        else:
            run |= said
    raise ValueError(f"{where}: it ends before the heading {','.join(_COLUMNS)}")


def write(trace: Trace, path: Path) -> None:
    """Write a trace: each sequence is a turn, each token a step at its position.

    Raises:
        ValueError: layers without a number of their own; two tokens at one place of a sequence.
    """
    layers = by_number(trace)
    with replacing(path) as new, open_to_write(new, path) as file:
        file.writelines(f"{line}\n" for line in _first_lines(trace, layers))
        file.writelines(_rows(layers))


def _first_lines(trace: Trace, layers: dict[int, LayerTrace]) -> Iterator[str]:
    first = next(iter(layers.values()))
    known = {"n_layer": max(layers) + 1, "n_expert": first.num_experts, "n_expert_used": first.k}
    run = {"model": trace.header.get("model") or "unknown", "arch": "unknown", **known, **trace.header.get("run", {})}
    yield FIRST
    yield "# " + " ".join(f"{name}={value}" for name, value in run.items())
    sizes = trace.header.get("bytes", {})
    for number, layer in layers.items():
        size = sizes.get(layer.name, {})
        yield f"# layer={number} " + " ".join(f"{name}={size.get(name, 0)}" for name in _OF_LAYER)
    yield ",".join(_COLUMNS)


def _rows(layers: dict[int, LayerTrace]) -> Iterator[str]:
    """Pass by pass, and in each layer by layer."""
    columns = {number: _columns(layer) for number, layer in layers.items()}
    of_layer = {number: passes(layer.tokens) for number, layer in layers.items()}
    places = {number: _places(layer.tokens) for number, layer in layers.items()}
    for key in sorted({key for found in of_layer.values() for key in found}):
        for number, found in of_layer.items():
            experts, weights, residency, size = columns[number]
            for row in found.get(key, ()):
                for slot, expert in enumerate(experts[row]):
                    if expert >= 0:
                        yield (
                            f"{places[number][row]},{number},{slot},{expert},{weights[row][slot]:.6g},"
                            f"{residency[row][slot]},{size[row][slot]}\n"
                        )


def _places(tokens: Tokens) -> list[str]:
    """Turn, phase and step of every token, as rows state them."""
    none = torch.zeros(len(tokens), dtype=torch.int32)
    turn, phase = (none if column is None else column for column in (tokens.sequence, tokens.phase))
    position = torch.arange(len(tokens)) if tokens.position is None else tokens.position
    if len(torch.stack([turn, position], dim=1).unique(dim=0)) < len(tokens):
        raise ValueError("two tokens of a sequence have one position, by which this format distinguishes tokens")
    columns = [column.tolist() for column in (turn, phase, position)]
    return [",".join(map(str, place)) for place in zip(*columns, strict=True)]


def _columns(layer: LayerTrace) -> tuple[list, list, list, list]:
    zeros = torch.zeros(layer.experts.shape, dtype=torch.long)
    weights = zeros if layer.weights is None else layer.weights
    extra = [layer.extra.get(name, zeros) for name in _EXTRA]
    return layer.experts.tolist(), weights.tolist(), extra[0].tolist(), extra[1].tolist()


BIGMOEONEDGE = Format(
    name="bigmoeonedge", line="route_trace v1 of BigMoeOnEdge: CSV with weights and cache hits",
    endings=(".route.csv.gz", ".route.csv"),
    keeps=frozenset({"sequence", "position", "phase", "step", "batch", "experts", "weights", *_EXTRA}),
    recognises=lambda path, head: head.startswith(FIRST.encode()), read=read, write=write,
)  # fmt: skip
