"""`moeify trace` records the decisions of any sparse model, and converts traces."""

from __future__ import annotations

import pytest
import torch

import moe_families as families
import tiny_models
from command_line import moeify, save_llama
from moeify import Recipe, save, sparsify
from moeify.files import write_tensors
from moeify.inspect.formats import read_trace
from moeify.inspect.trace import DECODE


def test_a_run_is_traced_on_text_and_what_it_decodes(trained, text, tmp_path):
    file = tmp_path / "t.trace.safetensors"
    ended = moeify(
        "trace", trained[0], "--data", text, "--output", file, "--tokens", 64, "--length", 16, "--generate", 3
    )
    assert ended.code == 0, ended.err
    assert "2 layers of 8 experts, 76 tokens, 12 of them decoded" in ended.out
    trace = read_trace(file)
    (tokens,) = trace.tables
    assert int((tokens.phase == DECODE).sum()) == 12
    assert set(tokens.vocabulary) == {i for i in tokens.ids.tolist() if i >= 0}
    assert tokens.domains == ("text",)
    assert trace.header["model"] == str(trained[0])
    assert all(layer.scores is not None and layer.logits is None for layer in trace)


def test_a_moe_of_transformers_is_traced_in_its_own_class(text, tmp_path):
    folder = save_llama(tmp_path / "switch")  # for its tokenizer
    families.build("switch_transformers", decoder_start_token_id=0).save_pretrained(folder)
    ended = moeify("trace", folder, "--data", text, "--output", tmp_path / "t.trace.jsonl", "--tokens", 32)
    assert ended.code == 0, ended.err
    encoder, decoder = read_trace(tmp_path / "t.trace.jsonl").tables
    assert len(encoder) == len(decoder) > 0


def test_a_streamed_model_gives_the_trace_of_the_one_in_memory(trained, text, tmp_path):
    traces = []
    for options in (["--batch", 4], ["--stream"]):
        file = tmp_path / "t.trace.safetensors"
        ended = moeify("trace", trained[0], "--data", text, "--output", file, "--tokens", 64, "--length", 16, *options)
        assert ended.code == 0, ended.err
        traces.append(read_trace(file))
    assert traces[0] == traces[1]


def test_a_model_of_images_is_traced_by_a_probe(tmp_path):
    save(sparsify(tiny_models.vit(), Recipe(num_experts=4), verbose=False), tmp_path / "vit")
    write_tensors(tmp_path / "images.safetensors", {"pixel_values": torch.randn(2, 3, 32, 32)})
    (tmp_path / "two.py").write_text(
        "import torch\ndef two():\n    return [{'pixel_values': torch.randn(1, 3, 32, 32)} for _ in range(2)]\n"
    )
    for probe, batches in (("images.safetensors", [0]), ("two.py:two", [0, 1])):
        file = tmp_path / "t.trace.safetensors"
        ended = moeify("trace", tmp_path / "vit", "--probe", tmp_path / probe, "--output", file, "--logits")
        assert ended.code == 0, ended.err
        (tokens,) = read_trace(file).tables
        assert tokens.sequence.unique().tolist() == [0, 1]
        assert tokens.batch.unique().tolist() == batches
        assert tokens.modalities == ("image",)
        assert all(layer.logits is not None for layer in read_trace(file))


def test_a_trace_is_converted(tmp_path):
    (tmp_path / "t.csv").write_text("0,1\n0,2\n1,0\n1,3\n0,2\n0,3\n1,1\n1,0\n")
    ended = moeify(
        "trace", tmp_path / "t.csv", "--output", tmp_path / "t.jsonl", "--experts", 8, "--format", "megatron"
    )
    assert ended.code == 0, ended.err
    assert "the format megatron cannot store phase, position, sequence, which are not written" in ended.out
    assert "2 layers of 8 experts, 2 tokens, 1 of them decoded" in ended.out
    assert read_trace(tmp_path / "t.jsonl").layers["decoder.layers.1"].experts.tolist() == [[0, 3], [1, 0]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("t.txt", "t.txt is not a trace in a known format"),
        ("nothing", "no model"),
        ("empty", "no model"),
    ],
)
def test_what_is_neither_model_nor_trace_is_refused(source: str, message: str, tmp_path):
    (tmp_path / "t.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    ended = moeify("trace", tmp_path / source, "--output", tmp_path / "x.trace.jsonl")
    assert ended.code == 2
    assert message in ended.err
    assert not (tmp_path / "x.trace.jsonl").exists()


def test_a_file_of_no_format_is_refused_before_a_model_runs(tmp_path):
    ended = moeify("trace", tmp_path / "nothing", "--output", tmp_path / "x.txt")
    assert ended.code == 2
    assert "x.txt has no ending of a format of traces" in ended.err


def test_a_model_without_a_tokenizer_needs_a_probe(tmp_path):
    tiny_models.mixtral().save_pretrained(tmp_path / "m")
    ended = moeify("trace", tmp_path / "m", "--output", tmp_path / "x.trace.jsonl")
    assert ended.code == 2
    assert "give other inputs than text by --probe" in ended.err
