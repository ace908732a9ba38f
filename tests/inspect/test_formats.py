"""Every format of traces: what is written is what is read, and what is damaged is refused by file and line."""

from __future__ import annotations

import base64
import gzip
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeify.files import write_tensors
from moeify.inspect.formats import find_format, format_names, read_trace, recognised, register_format, write_trace
from moeify.inspect.formats.llama_cpp import LLAMA_CPP
from moeify.inspect.trace import COLUMNS, DECODE, PREFILL, LayerTrace, Tokens, Trace

FEW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def traces(draw) -> Trace:
    """Any trace: columns that are there or not, two tables, experts that are not there, numbers of any kind."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    tables = []
    for size in (draw(st.integers(1, 6)), draw(st.integers(1, 4))):
        most = {"phase": 2, "domain": 2, "modality": 1}
        names = draw(st.sets(st.sampled_from(sorted(COLUMNS))))
        columns = {name: torch.randint(-1, most.get(name, 50), (size,), generator=g) for name in sorted(names)}
        kinds = {"domains": ("a", 'b "\n'), "modalities": ("text",), "vocabulary": {3: "\x00é", 49: ""}}
        tables.append(Tokens(size, **columns, **kinds))
    layers = {}
    for name in draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True)):
        table, experts, k = draw(st.sampled_from(tables)), draw(st.integers(1, 70000)), draw(st.integers(0, 3))
        shape, wide = (len(table), k), (len(table), experts)
        scores = torch.randn(wide, generator=g).half() * 1e4 if experts < 9 and draw(st.booleans()) else None
        weights = torch.rand(shape, generator=g).masked_fill(torch.rand(shape, generator=g) < 0.2, float("nan"))
        layers[name] = LayerTrace(
            name=name, num_experts=experts, tokens=table, experts=torch.randint(-1, experts, shape, generator=g),
            weights=draw(st.sampled_from([None, weights, weights.bfloat16()])), scores=scores,
            dropped=draw(st.sampled_from([None, torch.rand(shape, generator=g) < 0.5])),
            extra={"bytes": torch.randint(2**40, shape, generator=g)} if draw(st.booleans()) else {},
        )  # fmt: skip
    return Trace(layers=layers, header={"model": "m", "more": {"deep": [1, 2.5, None]}})


@pytest.mark.parametrize("ending", [".trace.safetensors", ".trace.jsonl", ".trace.jsonl.gz"])
@FEW
@given(trace=traces())
def test_our_own_formats_keep_everything(ending: str, trace: Trace, tmp_path: Path):
    file = tmp_path / f"x{ending}"
    write_trace(trace, file)
    found = read_trace(file)
    assert found == trace
    assert [[found.tables.index(layer.tokens)] for layer in found] == [
        [trace.tables.index(layer.tokens)] for layer in trace
    ]
    first = file.read_bytes()
    write_trace(found, file)
    assert file.read_bytes() == first


@st.composite
def served(draw, *, sequences: int = 3, layers: int = 3) -> Trace:
    """A trace as a server makes it: sequences one after the other, a prompt and then what is decoded."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    lengths = draw(st.lists(st.tuples(st.integers(2, 4), st.integers(1, 3)), min_size=1, max_size=sequences))
    rows = [
        (number, place, DECODE if place >= prompt else PREFILL, max(0, place - prompt + 1))
        for number, (prompt, more) in enumerate(lengths)
        for place in range(prompt + more)
    ]
    sequence, position, phase, step = torch.tensor(rows).unbind(1)
    table = Tokens(
        len(rows), sequence=sequence, position=position, phase=phase, step=step, batch=torch.zeros_like(sequence)
    )
    k, made = draw(st.integers(2, 3)), {}
    for number in sorted(draw(st.sets(st.integers(0, 9), min_size=2, max_size=layers))):
        scores = torch.rand(len(rows), 8, generator=g)
        weights, experts = scores.topk(k)
        weights = torch.tensor([[float(f"{w:.6g}") for w in row] for row in weights.tolist()])
        made[f"layers.{number}"] = LayerTrace(
            name=f"layers.{number}", num_experts=8, tokens=table, experts=experts, weights=weights,
            logits=scores.bfloat16(),
        )  # fmt: skip
    return Trace(layers=made)


def decisions(trace: Trace) -> dict[str, torch.Tensor]:
    return {layer.name.split(".")[-1]: layer.experts for layer in trace}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("llama.cpp", "t.csv"), ("bigmoeonedge", "t.route.csv"), ("bigmoeonedge", "t.route.csv.gz"), ("vllm", "t.npz"),
        ("vllm", "t.safetensors"), ("megatron", "t.jsonl"),
    ],
)  # fmt: skip
@FEW
@given(trace=served())
def test_formats_of_others_keep_what_they_have_a_place_for(name: str, file: str, trace: Trace, tmp_path: Path):
    if name == "megatron":  # which knows no sequences, and counts batches through all steps
        trace = trace.where(lambda tokens: tokens.need("sequence") == 0)
        table = replace(trace.tables[0], batch=trace.tables[0].step)
        trace = Trace(layers={layer.name: replace(layer, tokens=table) for layer in trace})
    write_trace(trace, tmp_path / file, name)
    assert recognised(tmp_path / file).name == name
    found = read_trace(tmp_path / file, num_experts=8)
    assert same(decisions(found), decisions(trace))
    for column in find_format(name).keeps - {"experts", "residency", "expert_bytes"}:
        if column in COLUMNS:
            assert torch.equal(getattr(found.tables[0], column), getattr(trace.tables[0], column)), column
        else:
            for one, other in zip(found, trace, strict=True):
                assert torch.equal(getattr(one, column), getattr(other, column)), column
    first = (tmp_path / file).read_bytes()
    write_trace(found, tmp_path / file, name)
    assert read_trace(tmp_path / file, num_experts=8) == found
    assert (tmp_path / file).read_bytes() == first


def test_columns_that_a_format_cannot_store_are_named(tmp_path, capsys):
    table = Tokens(1, ids=torch.tensor([5]))
    layer = LayerTrace(
        name="layers.0", num_experts=2, tokens=table, experts=torch.tensor([[1]]), weights=torch.ones(1, 1)
    )
    write_trace(Trace(layers={"layers.0": layer}), tmp_path / "a.jsonl")
    assert capsys.readouterr().out == "a.jsonl: the format megatron cannot store ids, weights, which are not written\n"
    write_trace(Trace(layers={"layers.0": layer}), tmp_path / "a.trace.jsonl")
    assert capsys.readouterr().out == ""


# What Megatron-LM writes


def record(step: int, layer: int, experts: list, **more) -> str:
    shape = {"num_tokens": len(experts), "topk": len(experts[0])}
    said = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0, **shape, **more}
    return json.dumps(said | {"top_indices": experts}) + "\n"


def test_megatron_has_a_file_per_rank_and_repeats_layers_in_micro_batches(tmp_path):
    (tmp_path / "router_trace_rank0.jsonl").write_text(
        record(0, 3, [[0, 1]]) + record(0, 5, [[1, 2]]) + record(0, 3, [[2, 3]]) + record(0, 5, [[0, 2]])
    )
    (tmp_path / "router_trace_rank1.jsonl").write_text(
        record(0, 3, [[1, 3], [0, 2]], rank=1) + record(0, 5, [[1, 3], [0, 1]], rank=1) + record(1, 3, [[0, 3]], rank=1)
    )
    trace = read_trace(tmp_path)
    layer = trace.layers["decoder.layers.3"]
    assert layer.experts.tolist() == [[0, 1], [2, 3], [1, 3], [0, 2], [0, 3]]
    assert layer.tokens.step.tolist() == [0, 0, 0, 0, 1]
    assert layer.tokens.batch.tolist() == [0, 1, 2, 2, 3]
    assert trace.layers["decoder.layers.5"].tokens.batch.tolist() == [0, 1, 2, 2]
    assert layer.num_experts == 4
    write_trace(trace, tmp_path / "again.jsonl")
    assert read_trace(tmp_path / "again.jsonl") == trace


def test_megatrons_logits_lie_beside_it(tmp_path):
    logits = torch.randn(2, 4).bfloat16()
    (tmp_path / "logits_rank0.bin").write_bytes(b"\0" * 6 + logits.view(torch.int16).numpy().tobytes())
    said = {"logit_offset": 6, "logit_bytes": 16, "logit_shape": [2, 4]}
    file = tmp_path / "router_trace_rank0.jsonl"
    file.write_text(record(0, 1, [[0], [1]], **said))
    trace = read_trace(file)
    assert torch.equal(trace.layers["decoder.layers.1"].logits, logits)
    assert trace.layers["decoder.layers.1"].num_experts == 4
    file.write_text(record(0, 1, [[0], [1]], **said | {"logit_offset": 8}))
    with pytest.raises(ValueError, match=r"line 1: logits_rank0\.bin ends before its logits, at byte 22"):
        read_trace(file)
    (tmp_path / "logits_rank0.bin").unlink()
    with pytest.raises(ValueError, match=r"has logits in logits_rank0\.bin, which is not there"):
        read_trace(file)


def test_megatrons_heads_for_later_tokens_are_layers_of_their_own(tmp_path):
    (tmp_path / "t.jsonl").write_text(record(0, 0, [[0, 2]]) + record(0, 0, [[1, 2]], block="mtp", mtp_idx=1))
    trace = read_trace(tmp_path / "t.jsonl")
    assert list(trace.layers) == ["decoder.layers.0", "mtp.layers.1.mtp_model_layer.layers.0"]
    write_trace(trace, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "t.jsonl").read_text()


# What llama.cpp writes


def test_llama_cpp_says_tokens_by_order_only(tmp_path):
    """A prompt of two tokens, whose last layer sees only the second, and one token that is decoded."""
    rows = [(0, 4), (0, 1), (0, 2), (0, 3), (2, 5), (2, 0), (0, 1), (0, 2), (2, 3), (2, 4)]
    (tmp_path / "t.csv").write_text("".join(f"{layer},{expert}\n" for layer, expert in rows))
    trace = read_trace(tmp_path / "t.csv", num_experts=6)
    assert trace.layers["layers.0"].experts.tolist() == [[4, 1], [2, 3], [1, 2]]
    assert trace.layers["layers.2"].experts.tolist() == [[5, 0], [3, 4]]
    assert trace.layers["layers.0"].tokens.phase.tolist() == [PREFILL, PREFILL, DECODE]
    assert trace.layers["layers.2"].tokens.position.tolist() == [1, 2]
    write_trace(trace, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "t.csv").read_bytes()


def test_the_headed_csv_of_a_fork_of_llama_cpp_is_read(tmp_path):
    rows = "prefill,0,1,0,3\nprefill,0,1,1,2\nprefill,1,1,0,0\nprefill,1,1,1,3\ndecode,2,1,0,1\ndecode,2,1,1,0\n"
    (tmp_path / "t.csv").write_text("phase,token,layer,rank,expert\n" + rows)
    trace = read_trace(tmp_path / "t.csv")
    assert trace.layers["layers.1"].experts.tolist() == [[3, 2], [0, 3], [1, 0]]
    assert trace.tables[0].step.tolist() == [0, 0, 1]


def test_prompts_that_share_no_expert_are_doubted(tmp_path, capsys):
    rows = [(layer, token * 2 + slot) for layer in range(2) for token in range(4) for slot in range(2)]
    (tmp_path / "t.csv").write_text("".join(f"{layer},{expert}\n" for layer, expert in rows))
    read_trace(tmp_path / "t.csv", k=2)
    assert "share no expert in any layer" in capsys.readouterr().out


# What vLLM's users save


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def test_vllms_dense_layers_and_unknown_tokens_are_told_by_zeros(tmp_path):
    array = np.array([[[0, 0], [1, 2]], [[0, 0], [3, 0]], [[0, 0], [0, 0]]], dtype=np.uint8)
    (tmp_path / "t.npy").write_bytes(npy(array))
    trace = read_trace(tmp_path / "t.npy")
    assert list(trace.layers) == ["layers.1"]
    assert trace.layers["layers.1"].experts.tolist() == [[1, 2], [3, 0], [-1, -1]]
    write_trace(trace, tmp_path / "again.npy", "vllm")
    assert np.array_equal(np.load(tmp_path / "again.npy", allow_pickle=False), array)


@pytest.mark.parametrize("coded", [lambda a: base64.b64encode(npy(a)).decode(), lambda a: a.tolist()])
def test_a_response_of_vllms_server_tells_prompt_and_answer(coded, tmp_path):
    array = np.array([[[1, 2]], [[3, 0]], [[0, 1]]], dtype=np.uint16)
    response = {
        "id": "cmpl-7", "usage": {"prompt_tokens": 2}, "choices": [{"index": 0, "routed_experts": coded(array)}]
    }  # fmt: skip
    (tmp_path / "t.json").write_text(json.dumps([response, response | {"id": "cmpl-8"}]))
    trace = read_trace(tmp_path / "t.json", num_experts=16)
    assert trace.header["requests"] == ["cmpl-7.0", "cmpl-8.0"]
    assert trace.tables[0].phase.tolist() == [0, 0, 1] * 2
    assert trace.tables[0].step.tolist() == [0, 0, 1] * 2
    assert trace.layers["layers.0"].experts.tolist() == [[1, 2], [3, 0], [0, 1]] * 2


# Damage

_HEADING = "# route_trace v1\n# model=m n_expert=4\n# layer=0 expert_bytes=8 dense_bytes=9\n"
_COLUMNS = "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes\n"
DAMAGED = {
    "route 1": ("t.route.csv", "# route_trace v2\n", "is not a trace in a known format"),
    "route 2": ("t.route.csv", _HEADING, "ends before the heading"),
    "route 3": ("t.route.csv", _HEADING + "turn,step\n", "line 4: the heading is not turn,phase"),
    "route 4": ("t.route.csv", _HEADING + _COLUMNS, "has no row"),
    "route 5": ("t.route.csv", _HEADING + _COLUMNS + "0,0,0,0,0,1\n", "line 5: 6 values for 9 columns"),
    "route 6": ("t.route.csv", _HEADING + _COLUMNS + "0,0,0,0,0,x,1,0,0\n", "line 5: .* is not a number"),
    "route 7": ("t.route.csv", _HEADING + _COLUMNS + "0,3,0,0,0,1,1,0,0\n", "line 5: the phase is neither 0 nor 1"),
    "route 8": ("t.route.csv", _HEADING + _COLUMNS + "0,0,0,0,0,4,1,0,0\n", "has expert 4, which a layer of 4 experts"),
    "route 9": ("t.route.csv", _HEADING + _COLUMNS + "0,0,0,0,0,1,1,0,0\n" * 2, "line 6: says again what line 5 says"),
    "route 11": ("t.route.csv", _HEADING + _COLUMNS + "0,0,0,0,1,1,1,0,0\n", "line 5: expert number 2 of a token"),
    "route 10": (
        "t.route.csv", _HEADING + _COLUMNS + "0,0,0,0,0,1,1,0,0\n0,1,0,0,1,2,1,0,0\n",
        "a token is of the prompt here and decoded elsewhere",
    ),
    "megatron 1": ("t.jsonl", record(0, 0, [[1]]) + "{", "line 2 is not JSON"),
    "megatron 2": ("t.jsonl", record(0, 0, [[1]]) + "{}", "line 2 is not a record of a router"),
    "megatron 3": ("t.jsonl", record(0, 0, [[1], [2, 3]]), "line 1: top_indices are not a table of numbers"),
    "megatron 4": ("t.jsonl", record(0, 0, [[1]], topk=2), "it has 1 tokens and topk 2, and top_indices"),
    "megatron 5": ("t.jsonl", record(-1, 0, [[1]]), "step is -1, and not a number from 0 on"),
    "llama 1": ("t.csv", "0,1\n0,x\n", "line 2: '0,x' has a value that is not a number"),
    "llama 2": ("t.csv", "0,1\n0\n", "line 2: 1 values for 2 columns"),
    "llama 6": ("t.csv", "0,1\n0,9999999\n", "has expert 9999999; the file is damaged, or say how many"),
    "llama 4": ("t.csv", "0,1\n-1,0\n", "line 2: '-1,0' has a number out of range"),
    "llama 5": ("t.csv", "phase,token,layer,rank,expert\nwarmup,0,1,0,3\n", "line 2: .* is not a number"),
    "llama 3": ("t.csv", "0,1\n0,1\n1,2\n1,3\n", "line 1: with 2 experts per token a token has one of them twice"),
    "jsonl 1": ("t.trace.jsonl", '{"moeify_trace": 2}\n', "is a trace of version 2, and this moeify reads 1"),
    "jsonl 2": ("t.trace.jsonl", '{"moeify_trace": 1}\n', "the header is damaged: it has no header and no tables"),
    "vllm 1": ("t.json", '{"choices": [{"routed_experts": "?"}]}', r"routed_experts of 0\.0 is not base64"),
    "vllm 2": ("t.json", '{"choices": []}', "holds no routed experts"),
    "nothing": ("t.txt", "hello", r"is not a trace in a known format \(safetensors, jsonl, megatron"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused_by_file_and_line(case: str, tmp_path):
    name, content, message = DAMAGED[case]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        read_trace(tmp_path / name)
    assert name in str(refused.value)


def test_every_cut_of_our_own_files_is_refused(tmp_path):
    trace = _small()
    for ending in (".trace.safetensors", ".trace.jsonl", ".trace.jsonl.gz"):
        file = tmp_path / f"x{ending}"
        write_trace(trace, file)
        whole = file.read_bytes()
        for cut in range(0, len(whole) - 1, max(1, len(whole) // 40)):
            file.write_bytes(whole[:cut])
            with pytest.raises(ValueError, match=r"x\.trace"):
                read_trace(file, "safetensors" if ending.endswith("tensors") else "jsonl")


def _small() -> Trace:
    table = Tokens(3, ids=torch.tensor([1, 2, 3]))
    layer = LayerTrace(name="layers.0", num_experts=4, tokens=table, experts=torch.tensor([[0, 1], [2, 3], [1, 3]]))
    return Trace(layers={"layers.0": layer})


def test_a_line_that_does_not_fit_is_named(tmp_path):
    file = tmp_path / "x.trace.jsonl"
    write_trace(_small(), file)
    lines = file.read_text().splitlines()
    lines[2] = lines[2].replace("[2, 3]", "[2]")
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="line 3 is damaged"):
        read_trace(file)


def test_no_pickle_is_read(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    np.save(tmp_path / "t.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="no array of numbers in"):
        read_trace(tmp_path / "t.npy")
    assert not (tmp_path / "exploded").exists()


def test_arrays_that_are_no_routed_experts_are_refused(tmp_path):
    (tmp_path / "t.npy").write_bytes(npy(np.zeros((2, 2))))
    with pytest.raises(ValueError, match=r"t is torch\.float64 of shape \(2, 2\), not whole numbers"):
        read_trace(tmp_path / "t.npy")
    write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(2, 1, 2).int(), "b": torch.ones(2, 3, 2).int()})
    with pytest.raises(ValueError, match="these are of two models"):
        read_trace(tmp_path / "t.safetensors")
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"0,1\n")[:12])
    with pytest.raises(ValueError, match="cannot be decompressed"):
        read_trace(tmp_path / "t.csv.gz")


def test_traces_that_a_format_cannot_hold_are_refused(tmp_path):
    trace = _small()
    layer = trace.layers["layers.0"]
    fewer = Trace(layers={"layers.0": replace(layer, experts=torch.tensor([[0, -1], [2, 3], [1, 3]]))})
    for file, name, message in (
        ("a.jsonl", "megatron", "some tokens have no expert"),
        ("a.csv", "llama.cpp", "the same number of experts for every token and layer"),
        ("a.npy", "vllm", "has fewer than 2 experts"),
    ):
        with pytest.raises(ValueError, match=message):
            write_trace(fewer, tmp_path / file, name)
    twins = {name: replace(layer, name=name) for name in ("layers.1.attention", "layers.1.mlp")}
    with pytest.raises(ValueError, match=r"layers\.1\.attention and layers\.1\.mlp both are layer 1"):
        write_trace(Trace(layers=twins), tmp_path / "a.csv")
    with pytest.raises(ValueError, match="layer head has no number"):
        write_trace(Trace(layers={"head": replace(layer, name="head")}), tmp_path / "a.csv")
    assert not list(tmp_path.iterdir())


def test_formats_have_names_and_endings():
    assert format_names()[:2] == ["safetensors", "jsonl"]
    register_format(LLAMA_CPP)
    with pytest.raises(ValueError, match=r"called 'llama\.cpp' already"):
        register_format(replace(LLAMA_CPP, line="another"))
    with pytest.raises(ValueError, match="no format of traces is called 'vlm'; did you mean 'vllm'"):
        find_format("vlm")
    with pytest.raises(ValueError, match=r"x\.txt has no ending of a format of traces"):
        write_trace(_small(), "x.txt")
    with pytest.raises(FileNotFoundError):
        read_trace("nothing-here.csv")
