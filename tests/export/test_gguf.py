"""GGUF files hold what the model computes, under the names and keys that llama.cpp reads."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest

import moe_families
from export_models import GGUF_CASES, LLAMA3, SIGMOID, router, shown, sparse
from moeify import export
from moeify.export import GgufFile, Unsupported
from moeify.export.gguf_families import ARCHITECTURES
from moeify.export.gguf_tokenizer import read_tokenizer
from moeify.find.where import every
from moeify.sparsify.make import fresh

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize(("base", "recipe", "config", "title"), GGUF_CASES)
def test_a_sparse_model_is_an_architecture_of_llama_cpp(base, recipe, config, title, tmp_path):
    model = sparse(base, recipe, **config)
    done = export.write(model, tmp_path / "out", "gguf")
    assert done.notes[0] == f"{title}, f32, no tokenizer"
    reader = gguf.GGUFReader(tmp_path / "out" / "model-f32.gguf")
    written = sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert written >= sum(p.numel() for p in model.parameters())
    groups = [vars(group).values() for group in vars(gguf.Keys).values() if isinstance(group, type)]
    keys = {key.replace("{arch}", title) for group in groups for key in group if isinstance(key, str)}
    assert not {key for key in reader.fields if not key.startswith("GGUF.")} - keys
    if find_spec("llama_cpp"):
        assert done.verification.difference < 1e-4


def test_every_architecture_is_tried(tmp_path):
    model = shown(moe_families.build("olmoe"))
    assert export.write(model, tmp_path / "out", "gguf").notes == ["olmoe, f32, no tokenizer"]
    assert {title for *_, title in GGUF_CASES} | {"olmoe"} == {*ARCHITECTURES}


def test_glm4moe_always_has_a_shared_expert_since_llama_cpp_adds_its_missing_tensors_without_an_error(tmp_path):
    model = sparse("llama", router(**SIGMOID))
    done = export.write(model, tmp_path / "out", "gguf", exporter=GgufFile(architecture="glm4moe"))
    assert "a shared expert of 32 units is added" in done.notes
    reader = gguf.GGUFReader(tmp_path / "out" / "model-f32.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for part in ("gate", "up", "down"):
        assert not tensors[f"blk.0.ffn_{part}_shexp.weight"].data.any()
    assert reader.get_field("glm4moe.expert_shared_count").contents() == 1


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_other_types_are_read_back_and_narrow_experts_are_filled_up(kind, tmp_path):
    model = sparse("llama", router(experts=partial(fresh, hidden=20)))
    done = export.write(model, tmp_path / "out", "gguf", exporter=GgufFile(kind))
    filled = "experts are padded with zeros, from 20 to 32 units" in done.notes
    assert filled == kind.startswith("q")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / f"model-{kind}.gguf").tensors}
    assert tensors["blk.0.ffn_down_exps.weight"].tensor_type.name == kind.upper()
    assert tensors["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"


def test_values_that_a_type_does_not_hold_are_refused(tmp_path):
    model = sparse()
    model.model.layers[1].mlp.experts.down_proj.data[0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_down_exps\.weight does not fit into f16"):
        export.write(model, tmp_path / "out", "gguf", exporter=GgufFile("f16"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "recipe", "config", "reason"),
    [
        ("llama", router(where=every(2)), {"num_hidden_layers": 4}, "llama, sparse layers: all its layers are sparse"),
        ("llama", "mixtral", {"hidden_act": "gelu"}, "activation: its experts compute silu, the model's gelu"),
        ("qwen3", "qwen3", {"rope_parameters": LLAMA3}, "it does not support rope scaling 'llama3'"),
        ("mistral", "mixtral", {"sliding_window": 4}, "llama, windows"),
        ("olmo2", "olmoe", {}, "norms: always before, in the model after"),
        ("stablelm", "phi", {}, "norm: always rms, in the model layer"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_with_the_reason(base, recipe, config, reason):
    assert reason in export.find_exporter("gguf").supports(sparse(base, recipe, **config))


def fast(folder, **changes):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "b",
        "ab",
        "\u2581ab",
    ]
    merges = [("a", "b"), ("\u2581", "ab")]
    model = models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.ByteFallback()
    if changes.get("words"):
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.model = models.BPE({token: i for i, token in enumerate(vocabulary)}, merges)
    if changes.get("bytes"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.model = models.BPE({token: i for i, token in enumerate(vocabulary)}, merges)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_a_tokenizer_of_merges_goes_into_the_file(tmp_path):
    tokenizer = fast(tmp_path / "tokenizer")
    model = sparse("llama", "mixtral", vocab_size=270)
    done = export.write(model, tmp_path / "out", "gguf", tokenizer=tokenizer)
    assert done.notes[0] == "llama, f32, with tokenizer"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model-f32.gguf", "moeify_export.json"}
    if find_spec("llama_cpp"):
        import llama_cpp

        read = llama_cpp.Llama(str(tmp_path / "out" / "model-f32.gguf"), vocab_only=True, verbose=False)
        for text in ("ab ab", "a  b", "b\u00e9ba"):
            assert read.tokenize(text.encode(), add_bos=False) == tokenizer(text)["input_ids"]
        read.close()


def test_merges_come_by_their_rank_and_tokens_without_a_name_are_unused(tmp_path):
    fast(tmp_path)
    read = read_tokenizer(tmp_path, 270)
    assert read.model == "llama"
    assert read.add_space_prefix
    assert read.scores[read.tokens.index("ab")] == 0 > read.scores[read.tokens.index("\u2581ab")]
    assert (read.tokens[269], read.types[269], read.types[1], read.types[3]) == ("[PAD269]", 5, 3, 6)
    fast(tmp_path, bytes=True)
    read = read_tokenizer(tmp_path, 264)
    assert (read.model, read.pre, read.merges) == ("gpt2", "gpt-2", ["a b", "\u2581 ab"])


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path):
    fast(tmp_path, words=True)
    with pytest.raises(Unsupported, match="has no pre-tokenizer that splits words by"):
        read_tokenizer(tmp_path, 300)
    fast(tmp_path)
    with pytest.raises(Unsupported, match="has 264 tokens, the model 200"):
        read_tokenizer(tmp_path, 200)


def test_an_unknown_type_is_an_error():
    with pytest.raises(ValueError, match="did you mean 'q8_0'"):
        GgufFile("q8")
