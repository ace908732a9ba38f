"""The router trace of Megatron-LM: JSONL per rank, one record per step and layer, logits in a file beside it.

`--moe-routing-trace-path` writes a folder of `router_trace_rank{rank}.jsonl`, and `logits_rank{rank}.bin` in bfloat16
(megatron/core/transformer/moe/router_trace.py; NVIDIA/Megatron-LM pull request 5220). Experts are recorded before the
dispatch, not ordered by weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moeify.data.decompress import parse_json, read_text
from moeify.files import replacing
from moeify.inspect.formats.base import Format, checked_experts, layer_number
from moeify.inspect.join import Part, join
from moeify.inspect.trace import LayerTrace, Tokens, Trace

_DECODER = re.compile(r"decoder\.layers\.(\d+)")
_MTP = re.compile(r"mtp\.layers\.(\d+)\.mtp_model_layer\.layers\.(\d+)")


def read(path: Path, *, num_experts: int | None = None, k: int | None = None) -> Trace:
    """The trace of a file, or of all ranks in a folder, of which each repeats its layers for other tokens.

    Raises:
        ValueError: damaged; the message names file and line.
    """
    files = sorted(path.glob("router_trace_rank*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no router_trace_rank*.jsonl")
    records = [record for file in files for record in _records(file)]
    if not records:
        raise ValueError(f"{path} has no record")
    largest = max(int(record["experts"].max()) for record in records)
    widths = [len(record["logits"][0]) for record in records if record["logits"] is not None]
    experts = checked_experts(largest, max(widths, default=num_experts or largest + 1), str(path))
    records.sort(key=lambda record: record["batch"])
    batches: dict[tuple[int, ...], int] = {}
    tables: dict[tuple[int, int], Tokens] = {}
    parts: dict[str, list[Part]] = {}
    for record in records:
        size, batch = len(record["experts"]), batches.setdefault(record["batch"], len(batches))
        if (batch, size) not in tables:
            step = torch.full((size,), record["batch"][0])
            tables[batch, size] = Tokens(size, step=step, batch=torch.full((size,), batch))
        layer = LayerTrace(
            name=record["name"], num_experts=experts, tokens=tables[batch, size], experts=record["experts"],
            logits=record["logits"],
        )  # fmt: skip
        parts.setdefault(record["name"], []).append((layer, {}))
    return Trace(layers=join(parts), header={"format": "megatron"})


def _records(file: Path) -> Iterator[dict[str, Any]]:
    """Every record: name of the layer, batch (step, rank, number of the micro-batch in it), experts and logits."""
    seen: dict[tuple[int, str], int] = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        where = f"{file}, line {number}"
        try:
            record = parse_json(line, str(file), number)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        name, experts = _name(record, where), _experts(record, where)
        key = (record["step"], name)
        seen[key] = seen.get(key, -1) + 1
        yield {
            "name": name, "batch": (record["step"], record.get("rank", 0), seen[key]), "experts": experts,
            "logits": _logits(record, file, where, len(experts)),
        }  # fmt: skip


def _name(record: Any, where: str) -> str:
    needed = ("step", "layer", "top_indices")
    if not isinstance(record, dict) or any(key not in record for key in needed):
        raise ValueError(f"{where} is not a record of a router: it needs {', '.join(needed)}")
    for key in ("step", "layer"):
        if not isinstance(record[key], int) or record[key] < 0:
            raise ValueError(f"{where}: {key} is {record[key]!r}, and not a number from 0 on")
    if record.get("block", "decoder") == "mtp":
        return f"mtp.layers.{record.get('mtp_idx', 0)}.mtp_model_layer.layers.{record['layer']}"
    return f"decoder.layers.{record['layer']}"


def _experts(record: Mapping[str, Any], where: str) -> Tensor:
    try:
        experts = torch.tensor(record["top_indices"])
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise ValueError(f"{where}: top_indices are not a table of numbers, with as many for every token") from None
    if experts.dim() != 2 or experts.is_floating_point() or experts.dtype == torch.bool or (experts < 0).any():
        raise ValueError(f"{where}: top_indices are not a table of numbers from 0 on, one row per token")
    told = (record.get("num_tokens", experts.shape[0]), record.get("topk", experts.shape[1]))
    if tuple(experts.shape) != told:
        raise ValueError(f"{where}: it has {told[0]} tokens and topk {told[1]}, and top_indices {tuple(experts.shape)}")
    return experts


def _logits(record: Mapping[str, Any], file: Path, where: str, tokens: int) -> Tensor | None:
    """The logits of a record, if it has some, from the file beside it."""
    if "logit_offset" not in record:
        return None
    beside = file.parent / f"logits_rank{record.get('rank', 0)}.bin"
    offset, shape = record["logit_offset"], record.get("logit_shape")
    is_table = isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)
    if not is_table or shape[0] != tokens or not isinstance(offset, int) or offset < 0:
        raise ValueError(f"{where}: logits of shape {shape} at byte {offset} do not fit its {tokens} tokens")
    size = 2 * shape[0] * shape[1]
    if record.get("logit_bytes", size) != size:
        raise ValueError(f"{where}: logits of shape {shape} in {record['logit_bytes']} bytes are not bfloat16")
    if not beside.is_file():
        raise ValueError(f"{where} has logits in {beside.name}, which is not there; leave the trace's files together")
    with beside.open("rb") as binary:
        binary.seek(offset)
        content = binary.read(size)
    if len(content) < size:
        raise ValueError(f"{where}: {beside.name} ends before its logits, at byte {offset + len(content)}")
    return torch.frombuffer(bytearray(content), dtype=torch.bfloat16).view(shape)


def write(trace: Trace, path: Path) -> None:
    """Write a trace as rank 0, and logits, in bfloat16, into `logits_rank0.bin` beside it.

    Raises:
        ValueError: tokens that have fewer than K experts; a layer whose name has no number.
    """
    if any((layer.experts < 0).any() or layer.k == 0 for layer in trace):
        raise ValueError("some tokens have no expert, and Megatron's format has K of every token; write moeify's own")
    has_logits = any(layer.logits is not None for layer in trace)
    with replacing(path) as new, new.open("w", encoding="utf-8") as file:
        if has_logits:
            with replacing(path.with_name("logits_rank0.bin")) as beside, beside.open("wb") as binary:
                file.writelines(json.dumps(record) + "\n" for record in _to_records(trace, binary))
        else:
            file.writelines(json.dumps(record) + "\n" for record in _to_records(trace, None))


def _to_records(trace: Trace, binary: BinaryIO | None) -> Iterator[dict[str, Any]]:
    """One record per layer and pass: tokens of one step and batch."""
    groups = {id(table): dict(_groups(table)) for table in trace.tables}
    identities = {layer.name: _identity(layer.name) for layer in trace}
    if len(set(identities.values())) < len(identities):
        raise ValueError("two layers have the same number, by which Megatron's format identifies them")
    for key in sorted({key for found in groups.values() for key in found}):
        for layer in trace:
            if (rows := groups[id(layer.tokens)].get(key)) is None:
                continue
            experts, (block, number, head) = layer.experts[rows], identities[layer.name]
            record: dict[str, Any] = {
                "step": key[0], "stage": "pre_dispatch", "block": block, "layer": number, "rank": 0,
                "num_tokens": len(experts), "topk": layer.k, **({} if head is None else {"mtp_idx": head}),
            }  # fmt: skip
            if binary is not None and layer.logits is not None:
                content = layer.logits[rows].bfloat16().contiguous()
                record |= {"logit_offset": binary.tell(), "logit_bytes": content.nbytes}
                record["logit_shape"] = list(content.shape)
                binary.write(content.view(torch.int16).numpy().tobytes())
            yield record | {"top_indices": experts.tolist()}


def _groups(tokens: Tokens) -> Iterator[tuple[tuple[int, int], Tensor]]:
    none = torch.zeros(len(tokens), dtype=torch.int32)
    columns = [none if column is None else column for column in (tokens.step, tokens.batch)]
    keys, inverse = torch.stack(columns, dim=1).unique(dim=0, return_inverse=True)
    for number, (step, batch) in enumerate(keys.tolist()):
        yield (step, batch), (inverse == number).nonzero().squeeze(1)


def _identity(name: str) -> tuple[str, int, int | None]:
    """Block, layer and number of the head for later tokens, as Megatron-LM finds them in a name."""
    if found := _MTP.search(name):
        return "mtp", int(found[2]), int(found[1])
    found = _DECODER.search(name)
    return "decoder", int(found[1]) if found else layer_number(name), None


def _recognises(path: Path, head: bytes) -> bool:
    if path.is_dir():
        return any(path.glob("router_trace_rank*.jsonl"))
    return head.startswith(b"{") and b'"step"' in head and (b'"pre_dispatch"' in head or b'"top_indices"' in head)


MEGATRON = Format(
    name="megatron", line="router trace of Megatron-LM: JSONL per rank, logits beside it",
    endings=(".jsonl",), keeps=frozenset({"step", "batch", "experts", "logits"}),
    recognises=_recognises, read=read, write=write,
)  # fmt: skip
