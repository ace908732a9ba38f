"""The `routed_experts` of vLLM: arrays (tokens, layers, k), one for every request.

`--enable-return-routed-experts` (vllm-project/vllm pull requests 28284 and 51906) puts them into `CompletionOutput` as
NumPy arrays, and into responses of the server as .npy files in base64. This module reads arrays that users saved (.npy,
.npz, .safetensors) and responses (.json). An array has every layer of the model, with zeros for dense ones. It has no
experts for the last generated token, which the model never read.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from moeify.data.decompress import byte_limit, expands_too_far, parse_json, read_text
from moeify.files import read_tensors, regular, replacing, write_tensors
from moeify.inspect.formats.base import Format, by_number, checked_experts
from moeify.inspect.trace import DECODE, PREFILL, LayerTrace, Tokens, Trace


def read(path: Path, *, num_experts: int | None = None, k: int | None = None) -> Trace:
    """The trace of a file; without `num_experts` E is one more than the largest expert index.

    Raises:
        ValueError: damaged, or an array that is not (tokens, layers, k) of whole numbers.
    """
    readers = {".npy": _npy, ".npz": _npz, ".safetensors": read_tensors, ".json": _responses}
    if (reader := readers.get(path.suffix.lower())) is None:
        raise ValueError(f"{path.name} is none of {', '.join(readers)}, in which routed experts of vLLM are read")
    found = reader(path)
    requests = {name: _checked(array, name, path) for name, array in found.items() if not name.startswith(_PROMPT)}
    if not requests:
        raise ValueError(f"{path} holds no routed experts")
    shapes = {tuple(array.shape[1:]) for array in requests.values()}
    if len(shapes) > 1:
        raise ValueError(f"{path} holds arrays of {sorted(shapes)} layers and experts; these are of two models")
    experts = torch.cat(list(requests.values()))
    largest = checked_experts(int(experts.max()), num_experts, str(path))
    tokens = _table({name: len(array) for name, array in requests.items()}, found)
    layers = {}
    for number in range(experts.shape[1]):
        table = experts[:, number].clone()
        if table.shape[1] > 1:
            table[(table == table[:, :1]).all(1)] = -1  # one expert K times: nothing was routed, or nothing is known
            if bool((table == -1).all()):
                continue
        layers[f"layers.{number}"] = LayerTrace(
            name=f"layers.{number}", num_experts=largest, tokens=tokens, experts=table
        )
    return Trace(layers=layers, header={"format": "vllm", "requests": list(requests), "layers": experts.shape[1]})


_PROMPT = "prompt_tokens:"


def _table(sizes: Mapping[str, int], found: Mapping[str, Tensor]) -> Tokens:
    """The tokens of all requests; the phase is known where a response has the length of its prompt."""
    sequence = torch.repeat_interleave(torch.tensor(list(sizes.values())))
    position = torch.cat([torch.arange(size) for size in sizes.values()])
    columns: dict[str, Any] = {"sequence": sequence, "position": position}
    if all(_PROMPT + name in found for name in sizes):
        prompt = torch.tensor([int(found[_PROMPT + name]) for name in sizes])[sequence]
        columns["phase"] = torch.where(position < prompt, PREFILL, DECODE)
        columns["step"] = (position - prompt + 1).clamp(min=0)
    return Tokens(len(sequence), **columns)


def _checked(array: Tensor, name: str, path: Path) -> Tensor:
    if array.dim() != 3 or array.is_floating_point() or array.is_complex() or array.dtype == torch.bool:
        raise ValueError(f"{path}: {name} is {array.dtype} of shape {tuple(array.shape)}, not whole numbers (T, L, K)")
    if array.numel() == 0 or (array.long() < 0).any():
        raise ValueError(f"{path}: {name} is empty, or has a number below 0")
    return array.long()


def _npy(path: Path) -> dict[str, Tensor]:
    return {path.stem: _array(regular(path).read_bytes(), str(path))}


def _npz(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(regular(path)) as packed:
            if sum(member.file_size for member in packed.infolist()) > byte_limit(path):
                raise expands_too_far(path)
            members = [name for name in packed.namelist() if name.endswith(".npy")]
            return {name[:-4]: _array(packed.read(name), f"{path}: {name}") for name in members}
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or not an .npz file: {error}") from None


def _array(content: bytes, where: str) -> Tensor:
    """The array of a .npy file, never a pickle."""
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
        return torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array)
    except (ValueError, EOFError, OSError, TypeError) as error:
        raise ValueError(f"{where} is damaged, or no array of numbers in .npy format: {error}") from None


def _responses(path: Path) -> dict[str, Tensor]:
    """Routed experts of every choice of a response, or of a list of responses."""
    try:
        content = parse_json(read_text(path), str(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    found: dict[str, Tensor] = {}
    for number, response in enumerate(content if isinstance(content, list) else [content]):
        choices = response.get("choices", [response]) if isinstance(response, dict) else []
        for choice in choices:
            given = choice.get("routed_experts") if isinstance(choice, dict) else None
            if given is None:
                continue
            name = f"{response.get('id', number)}.{choice.get('index', 0)}"
            found[name] = _decoded(given, f"{path}: routed_experts of {name}")
            prompt = (response.get("usage") or {}).get("prompt_tokens")
            if isinstance(prompt, int):
                found[_PROMPT + name] = torch.tensor(prompt)
    return found


def _decoded(given: Any, where: str) -> Tensor:
    if isinstance(given, str):
        try:
            return _array(base64.b64decode(given, validate=True), where)
        except binascii.Error as error:
            raise ValueError(f"{where} is not base64: {error}") from None
    try:
        return torch.tensor(given)
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise ValueError(f"{where} is neither base64 nor a table of numbers") from None


def write(trace: Trace, path: Path) -> None:
    """Write a trace, one array per sequence: .npz or .safetensors, or .npy for a single one.

    Where a layer has only some of the tokens, the others have zeros, which mean unknown.

    Raises:
        ValueError: layers of different K or tokens, or without a number of their own; several sequences as .npy.
    """
    layers = by_number(trace)
    tokens = max(trace.tables, key=len)
    if len(ks := {layer.k for layer in layers.values()}) > 1 or 0 in ks:
        raise ValueError(f"layers have {sorted(ks)} experts per token, and this format has one number for all of them")
    largest = max(layer.num_experts for layer in layers.values())
    kind = torch.uint8 if largest <= 2**8 else torch.int32
    experts = torch.zeros(len(tokens), max(max(layers) + 1, trace.header.get("layers", 0)), ks.pop(), dtype=kind)
    for number, layer in layers.items():
        none = layer.experts < 0
        if bool(none.any(1).ne(none.all(1)).any()) or (layer.k == 1 and bool(none.any())):
            raise ValueError(f"a token of {layer.name} has fewer than {layer.k} experts; this format has K of each")
        experts[_rows_in(tokens, layer.tokens, layer.name), number] = layer.experts.clamp(min=0).to(kind)
    sequence = torch.zeros(len(tokens), dtype=torch.int32) if tokens.sequence is None else tokens.sequence
    names = trace.header.get("requests", [])
    arrays = {}
    for place, number in enumerate(sequence.unique().tolist()):
        name = names[place] if place < len(names) else f"request-{number}"
        arrays[name] = experts[sequence == number]
    _save(arrays, path)


def _rows_in(tokens: Tokens, some: Tokens, name: str) -> Tensor:
    """The rows of a table's tokens in a larger one, found by sequence and position."""
    if some is tokens:
        return torch.arange(len(tokens))
    rows = {place: row for row, place in enumerate(_places(tokens))}
    try:
        return torch.tensor([rows[place] for place in _places(some)])
    except KeyError:
        raise ValueError(
            f"layer {name} has tokens that others have not, and an array has the same for all layers; choose layers "
            "that see the same by trace.only, or write moeify's own format"
        ) from None


def _places(tokens: Tokens) -> list[tuple[int, ...]]:
    columns = (tokens.need("sequence").tolist(), tokens.need("position").tolist())
    return list(zip(*columns, strict=True))


def _save(arrays: dict[str, Tensor], path: Path) -> None:
    ending = path.suffix.lower()
    if ending == ".safetensors":
        write_tensors(path, arrays)
    elif ending == ".npz":
        with replacing(path) as new, new.open("wb") as file:
            _zip(arrays, file)
    elif ending == ".npy" and len(arrays) == 1:
        with replacing(path) as new, new.open("wb") as file:
            np.save(file, next(iter(arrays.values())).numpy(), allow_pickle=False)
    else:
        raise ValueError(
            f"{path.name} cannot hold {len(arrays)} sequences; vLLM's arrays are written as .npz, .safetensors or, if "
            "there is one, as .npy"
        )


def _zip(arrays: dict[str, Tensor], file: BinaryIO) -> None:
    with zipfile.ZipFile(file, "w") as packed:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array.numpy(), allow_pickle=False)
            packed.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())


def _recognises(path: Path, head: bytes) -> bool:
    if path.suffix.lower() == ".json":
        return b"routed_experts" in head or b"choices" in head
    if path.suffix.lower() == ".safetensors":
        return b"moeify_trace" not in head
    return head.startswith(b"\x93NUMPY") or (head.startswith(b"PK") and path.suffix.lower() == ".npz")


VLLM = Format(
    name="vllm", line="routed_experts of vLLM: arrays (tokens, layers, k) by request",
    endings=(".npz", ".npy", ".safetensors", ".json"), keeps=frozenset({"sequence", "position", "experts"}),
    recognises=_recognises, read=read, write=write,
)  # fmt: skip
