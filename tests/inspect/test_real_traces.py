"""Traces of real models of 26 and 30 billion parameters: they are counted as their files are, and kept to the byte."""

from __future__ import annotations

import csv
import gzip
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from moeify.data.claim_files import data_file
from moeify.inspect.formats import read_trace, write_trace
from moeify.inspect.trace import DECODE

TRACES = {"qwen": (48, 156, 128), "gemma": (30, 157, 128)}


def trace_file(model: str) -> Path:
    try:
        return data_file(f"routing-traces/{model}.route.csv.gz")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


def rows(file: Path) -> list[dict[str, str]]:
    lines = [line for line in gzip.decompress(file.read_bytes()).decode().splitlines() if not line.startswith("#")]
    return list(csv.DictReader(lines))


@pytest.mark.data
@pytest.mark.parametrize("model", TRACES)
def test_rows_per_expert_and_experts_per_window_are_those_of_the_file(model: str):
    file = trace_file(model)
    trace, told = read_trace(file), rows(file)
    layers, tokens, experts = TRACES[model]
    assert len(trace.layers) == layers
    assert max(len(table) for table in trace.tables) == tokens
    counted = Counter((int(row["layer"]), int(row["expert"])) for row in told)
    windows = defaultdict(set)
    for row in told:
        if row["phase"] == "1":
            windows[int(row["layer"]), int(row["step"]) // 16].add(int(row["expert"]))
    decoded = trace.where(lambda table: table.need("phase") == DECODE)
    assert sum(int(layer.assigned.sum()) for layer in trace) == len(told)
    for number in range(layers):
        layer = trace.layers[f"layers.{number}"]
        assert layer.num_experts == experts
        assert layer.assigned.tolist() == [counted[number, expert] for expert in range(experts)]
        layer = decoded.layers[f"layers.{number}"]
        for window in (layer.tokens.position // 16).unique().tolist():
            there = layer.experts[layer.tokens.position // 16 == window].unique()
            assert set(there.tolist()) == windows.pop((number, window))
    assert not windows


@pytest.mark.data
@pytest.mark.parametrize("model", TRACES)
def test_a_real_trace_is_written_as_it_was(model: str, tmp_path):
    file = trace_file(model)
    trace = read_trace(file)
    write_trace(trace, tmp_path / "again.route.csv.gz")
    assert gzip.decompress((tmp_path / "again.route.csv.gz").read_bytes()) == gzip.decompress(file.read_bytes())
    write_trace(trace, tmp_path / "ours.trace.safetensors")
    assert read_trace(tmp_path / "ours.trace.safetensors") == trace


@pytest.mark.data
@pytest.mark.parametrize(("name", "file"), [("llama.cpp", "t.csv"), ("megatron", "t.jsonl"), ("vllm", "t.npz")])
def test_a_real_trace_is_the_same_in_the_formats_of_others(name: str, file: str, tmp_path):
    trace = read_trace(trace_file("gemma"))
    write_trace(trace, tmp_path / file, name)
    found = read_trace(tmp_path / file, num_experts=128)
    assert len(found.layers) == len(trace.layers)
    for one, other in zip(found, trace, strict=True):
        assert one.assigned.tolist() == other.assigned.tolist()
