"""The MoE trace of llama.cpp: CSV, one row per layer and expert in the order of computation.

`llama-moe-trace` (ggml-org/llama.cpp pull request 28544) writes `layer,expert` without a heading, and states neither
how many experts a token has nor which rows belong to one token; both follow from the order. A fork
(Cartaz/llama.cpp-vulkan-moe) writes `phase,token,layer,rank,expert`. Both are read, the first is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from moeify.data.decompress import read_text
from moeify.files import replacing
from moeify.inspect.formats.base import Format, Rows, by_number, passes
from moeify.inspect.formats.gzipped import open_to_write
from moeify.inspect.formats.table import parse_rows
from moeify.inspect.trace import DECODE, PREFILL, LayerTrace, Tokens, Trace
from moeify.notices import notify

_FORK = "phase,token,layer,rank,expert"
_PHASES = {"prefill": PREFILL, "decode": DECODE}
Run = tuple[int, int, int]
"""Rows of one layer that follow each other: the layer, the first row and how many there are."""


def read(path: Path, *, num_experts: int | None = None, k: int | None = None) -> Trace:
    """The trace of a file; without `num_experts` E is one more than the largest expert index.

    Args:
        path: the file.
        num_experts: E.
        k: experts per token; by default the greatest common divisor of the lengths of runs of one layer.

    Raises:
        ValueError: damaged, with file and line; rows that do not come out as K experts for every token.
    """
    lines = read_text(path).splitlines()
    if lines and lines[0] == _FORK:
        return _read_fork(path, lines[1:], num_experts)
    column = parse_rows(lines, ("layer", "expert"), str(path))
    layer, expert = column["layer"], column["expert"]
    runs = list(_runs(layer.tolist()))
    k = k or math.gcd(*(size for _, _, size in runs))
    token, table = _tokens(runs, k, str(path))
    slot = torch.arange(len(layer)) - torch.repeat_interleave(
        torch.tensor([first for _, first, _ in runs]), torch.tensor([size for _, _, size in runs])
    )
    rows = Rows(token=token, layer=layer, slot=slot % k, expert=expert, line=torch.arange(1, len(layer) + 1), values={})
    _refuse_repeated(rows, k, path)
    layers = rows.layers(table, num_experts, str(path))
    _doubt(layers, path)
    return Trace(layers=layers, header={"format": "llama.cpp"})


def _runs(layers: Sequence[int]) -> Iterator[Run]:
    starts = [0, *(i for i, (one, next_) in enumerate(pairwise(layers), 1) if one != next_), len(layers)]
    for first, end in pairwise(starts):
        yield layers[first], first, end - first


def _tokens(runs: Sequence[Run], k: int, where: str) -> tuple[Tensor, Tokens]:
    """The token of every row, and the table of tokens.

    A pass ends where the number of the layer falls. Its last layer may see its last tokens only, those whose logits
    are needed. A pass of several tokens is of a prompt, and begins a new sequence if it follows one that was decoded.
    """
    token, sequence, phase = [], [], []
    for run in _passes(runs):
        for number, first, size in run:
            if size % k:
                raise ValueError(
                    f"{where}, line {first + 1}: {size} rows of layer {number}, which are not {k} experts for each of "
                    "some tokens; the file is cut off, or k is wrong"
                )
        count, begun = max(size for _, _, size in run) // k, len(phase)
        token += [begun + count - size // k + torch.arange(size) // k for _, _, size in run]
        is_new = bool(begun) and count > 1 and phase[-1] == DECODE
        sequence += [(sequence[-1] if begun else 0) + is_new] * count
        phase += [PREFILL if count > 1 or not begun else DECODE] * count
    return torch.cat(token), _table(torch.tensor(sequence), torch.tensor(phase))


def _passes(runs: Sequence[Run]) -> Iterator[list[Run]]:
    current: list[Run] = []
    for run in runs:
        if current and run[0] <= current[-1][0]:
            yield current
            current = []
        current.append(run)
    yield current


def _table(sequence: Tensor, phase: Tensor) -> Tokens:
    """The tokens of sequences that follow each other."""
    place = torch.arange(len(sequence)) - torch.searchsorted(sequence, sequence)
    decoded = (phase == DECODE).long()
    before = torch.where(phase == PREFILL, place + 1, 0)
    last_of_prompt = torch.zeros(len(sequence), dtype=torch.long).scatter_reduce(0, sequence, before, "amax")
    return Tokens(
        len(sequence), sequence=sequence, position=place, phase=phase, batch=torch.zeros_like(sequence),
        step=(place - last_of_prompt[sequence] + 1) * decoded,
    )  # fmt: skip


def _refuse_repeated(rows: Rows, k: int, path: Path) -> None:
    """Refuse a token with the same expert twice, which shows that k is wrong."""
    ordered = rows.expert.view(-1, k).sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    if twice.any():
        line = int(twice.nonzero()[0]) * k + 1
        raise ValueError(
            f"{path}, line {line}: with {k} experts per token a token has one of them twice; name the right k, or the "
            "file is damaged"
        )


def _doubt(layers: dict[str, LayerTrace], path: Path) -> None:
    """Warn if the prompts look like those of an early version of the tool: consecutive tokens share no expert."""
    for layer in layers.values():
        prompt = layer.experts[layer.tokens.need("phase") == PREFILL][: layer.num_experts // layer.k]
        if len(prompt) < 4 or prompt.numel() > len(prompt.unique()):
            return
    if layers:
        notify(
            f"{path}: the first tokens of the prompt share no expert in any layer. Early versions of llama-moe-trace "
            "wrote one token's ranking there; trust what was decoded, or record it again"
        )


def _read_fork(path: Path, lines: Sequence[str], num_experts: int | None) -> Trace:
    numbered = [re.sub("^(prefill|decode)(?=,)", lambda phase: str(_PHASES[phase[0]]), line) for line in lines]
    column = parse_rows(numbered, _FORK.split(","), str(path), first_line=2)
    positions, place = column["token"].unique(return_inverse=True)
    phase = torch.zeros(len(positions), dtype=torch.long).index_put((place,), column["phase"])
    found = Rows(
        token=place, layer=column["layer"], slot=column["rank"], expert=column["expert"],
        line=torch.arange(2, len(lines) + 2), values={},
    )  # fmt: skip
    table = _table(torch.zeros_like(phase), phase)
    return Trace(layers=found.layers(table, num_experts, str(path)), header={"format": "llama.cpp"})


def write(trace: Trace, path: Path) -> None:
    """Write a trace, prompts first and then what was decoded, sequence by sequence.

    Raises:
        ValueError: tokens that have fewer than K experts; layers of different K or without a number of their own.
    """
    layers = by_number(trace)
    if len({layer.k for layer in layers.values()}) > 1 or any((layer.experts < 0).any() for layer in layers.values()):
        raise ValueError("llama.cpp's format has the same number of experts for every token and layer; write moeify's")
    with replacing(path) as new, open_to_write(new, path) as file:
        of_layer = {number: passes(layer.tokens) for number, layer in layers.items()}
        for key in sorted({key for found in of_layer.values() for key in found}):
            for number, layer in layers.items():
                for row in layer.experts[of_layer[number].get(key, [])].tolist():
                    file.writelines(f"{number},{expert}\n" for expert in row)


LLAMA_CPP = Format(
    name="llama.cpp", line="llama-moe-trace: CSV of layer and expert, in the order of computation",
    endings=(".csv", ".csv.gz"), keeps=frozenset({"phase", "step", "experts"}),
    recognises=lambda path, head: bool(re.match(rb"\d+,\d+\r?\n|\d+,\d+$", head)) or head.startswith(_FORK.encode()),
    read=read, write=write,
)  # fmt: skip
