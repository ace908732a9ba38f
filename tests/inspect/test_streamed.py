"""Models whose weights stay on disk decide as those in memory do, and hold little at a time."""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager

import pytest
import torch

import moeify
from moe_families import build, inputs
from moeify.files import open_tensors
from moeify.inspect import capture, stream
from moeify.sparsify import Recipe, sparsify
from moeify.store import reading
from moeify.store.converted import Converted
from tiny_models import causal_lm, mixtral

FAMILIES = {
    "mixtral": True, "qwen3_moe": True, "deepseek_v3": True, "gpt_oss": True, "granitemoe": True, "dbrx": False,
    "switch_transformers": False, "ernie4_5_vl_moe_text": True,
}  # fmt: skip
"""Families that store their experts in unlike ways, and whether these are read one by one."""


def in_memory(folder, model):
    loaded = type(model).from_pretrained(folder, dtype=model.dtype).eval()
    if hasattr(loaded, "set_experts_implementation"):
        loaded.set_experts_implementation("eager")
    return loaded


@pytest.fixture
def read(monkeypatch):
    """The experts that were read, by the name of their stack."""
    found, one = [], Converted.read_expert
    monkeypatch.setattr(Converted, "read_expert", lambda self, *which: found.append(which) or one(self, *which))
    return found


@pytest.mark.parametrize(("family", "one_by_one"), FAMILIES.items())
def test_a_streamed_model_decides_as_the_one_in_memory(tmp_path, read, family, one_by_one):
    model = build(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    batches = [inputs(model, length=length) for length in (8, 5)]
    streamed = stream(tmp_path, architecture=type(model).__name__)
    assert capture(streamed, batches) == capture(in_memory(tmp_path, model), batches)
    assert bool(read) == one_by_one
    layers = [p for name, p in streamed.named_parameters() if re.search(r"(layers|block|blocks)\.\d", name)]
    assert layers
    assert all(p.is_meta for p in layers)


def test_one_file_at_a_time_is_mapped_to_open_a_model(tmp_path, monkeypatch):
    model, most, now = build("mixtral"), [], set()
    model.save_pretrained(tmp_path, max_shard_size="20KB")

    @contextmanager
    def counted(file):
        with open_tensors(file) as tensors:
            now.add(file)
            most.append(len(now))
            yield tensors
        now.remove(file)

    monkeypatch.setattr(reading, "open_tensors", counted)
    stream(tmp_path)
    assert len(most) > 4
    assert max(most) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_more_files_than_a_process_may_open_are_read(tmp_path):
    import resource

    ours, theirs = (
        sparsify(causal_lm("llama", num_hidden_layers=16), Recipe(num_experts=4), verbose=False),
        build("mixtral", num_hidden_layers=16),
    )
    moeify.save(ours.eval(), tmp_path / "ours", max_shard_size="4KB")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    now = len(os.listdir("/dev/fd"))
    assert min(len([*(tmp_path / name).glob("*.safetensors")]) for name in ("ours", "theirs")) > 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (now + 32, most[1]))
    try:
        loaded, *streamed = moeify.load(tmp_path / "ours"), stream(tmp_path / "ours"), stream(tmp_path / "theirs")
        for model, same in zip((ours, theirs), streamed, strict=True):
            with torch.no_grad():
                assert torch.allclose(*(m(**inputs(model)).logits[:, -1] for m in (same, model)), atol=1e-5)
        assert torch.equal(loaded(**inputs(ours)).logits, ours(**inputs(ours)).logits)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)


def test_only_experts_that_a_token_is_sent_to_are_read(tmp_path, read):
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path)
    trace = capture(stream(tmp_path), [{"input_ids": torch.tensor([[5, 6, 7]])}])
    wanted = {(name, expert) for name, layer in trace.layers.items() for expert in layer.experts.unique().tolist()}
    assert {(name.removesuffix(".experts.down_proj"), expert) for name, expert in read if "down" in name} == wanted
    assert len(read) == 2 * len(wanted) < 2 * 8 * len(trace.layers)


def test_it_gives_the_last_logits_writes_and_learns_nothing(tmp_path):
    model = mixtral(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded, streamed = in_memory(tmp_path, model), stream(tmp_path)
    ids = torch.randint(3, 90, (2, 7))
    with torch.no_grad():
        assert torch.allclose(streamed(ids).logits, loaded(ids).logits[:, -1:], atol=1e-5)
        written = [each.generate(ids, max_new_tokens=4, do_sample=False) for each in (streamed, loaded)]
    assert torch.equal(*written)
    with pytest.raises(RuntimeError, match="a streamed model cannot be trained"):
        streamed(ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_ours_is_streamed_in_the_dtype_of_its_files(tmp_path, dtype):
    model = sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False).to(dtype).eval()
    moeify.save(model, tmp_path)
    batch = {"input_ids": torch.randint(3, 90, (2, 7))}
    assert capture(stream(tmp_path), [batch]) == capture(moeify.load(tmp_path), [batch])


def test_bf16_is_read_as_it_is_and_as_one_asks_for(tmp_path):
    model = build("deepseek_v3").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert capture(stream(tmp_path), [inputs(model)]) == capture(in_memory(tmp_path, model), [inputs(model)])
    assert stream(tmp_path, dtype=torch.float32).get_input_embeddings().weight.dtype == torch.float32


def test_what_cannot_be_streamed_is_refused(tmp_path):
    mixtral().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no model class 'MixtralForNothing'"):
        stream(tmp_path, architecture="MixtralForNothing")
    change(tmp_path, intermediate_size=40)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"an expert of .*gate_up_proj is \(\d+, 32\) .* needs \(80, 32\)"),
    ):
        stream(tmp_path)(torch.tensor([[5]]))
    change(tmp_path, vocab_size=99)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \(256, 32\) in .* the model needs \(99, 32\)"):
        stream(tmp_path)
    change(tmp_path, model_type="llama")
    with pytest.raises(ValueError, match=r"not those of a LlamaForCausalLM; missing: model.layers.0.mlp.gate_proj"):
        stream(tmp_path, architecture="LlamaForCausalLM")
    change(tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="is quantised"):
        stream(tmp_path)


def change(folder, **values):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
