"""`moeify sparsify`."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from command_line import moeify
from moeify.store import load
from tiny_models import bert, causal_lm

JSON = '{"num_experts": 3, "router": {"name": "topk", "k": 2, "normalize": false}, "experts": "fresh"}'
TOML = 'num_experts = 3\nexperts = "fresh"\n[router]\nname = "topk"\nk = 2\nnormalize = false\n'


def test_by_default_a_model_becomes_copies_that_compute_what_it_did(tmp_path, llama):
    ended = moeify("sparsify", llama, tmp_path / "sparse")
    assert ended.code == 0
    assert ended.out.endswith(f"moeify: saved in {tmp_path / 'sparse'}\n")
    sparse, dense, ids = (
        load(tmp_path / "sparse"),
        AutoModelForCausalLM.from_pretrained(llama),
        torch.arange(3, 9)[None],
    )
    assert sparse.model.layers[0].mlp.experts.num_experts == 8
    assert torch.allclose(sparse(ids).logits, dense.eval()(ids).logits, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "sparse").encode("def") == [3]


@pytest.mark.parametrize(("name", "text"), [("recipe.json", JSON), ("recipe.toml", TOML)])
def test_recipes_are_read_from_files(tmp_path, llama, name, text):
    (tmp_path / name).write_text(text)
    ended = moeify("sparsify", llama, tmp_path / "sparse", "--recipe", tmp_path / name)
    assert ended.code == 0, ended.err
    router = load(tmp_path / "sparse").model.layers[1].mlp.router
    assert (router.num_experts, router.k, router.normalize) == (3, 2, False)


def test_a_model_without_tokenizer_is_saved_with_a_word(tmp_path):
    causal_lm("llama").save_pretrained(tmp_path / "dense")
    ended = moeify("sparsify", tmp_path / "dense", tmp_path / "sparse", "--experts", 4, "--k", 2)
    assert ended.code == 0
    assert "moeify: the model has no tokenizer, so none was saved\n" in ended.out
    assert json.loads((tmp_path / "sparse" / "config.json").read_text())["recipe"]["num_experts"] == 4


def test_other_architectures_are_named(tmp_path):
    bert().save_pretrained(tmp_path / "dense")
    ended = moeify("sparsify", tmp_path / "dense", tmp_path / "sparse", "--architecture", "AutoModel")
    assert ended.code == 0, ended.err
    assert type(load(tmp_path / "sparse")) is type(AutoModel.from_pretrained(tmp_path / "dense"))
    ended = moeify("generate", tmp_path / "sparse")
    assert ended.code == 2
    assert ended.err.startswith("moeify: error: ")


def test_a_model_is_verified_with_the_input_of_a_file_or_not_at_all(tmp_path, llama):
    save_file({"input_ids": torch.arange(3, 9)[None]}, tmp_path / "probe.safetensors")
    (tmp_path / "probe.py").write_text(
        "import torch\n\ndef given():\n    return {'input_ids': torch.arange(3, 9)[None]}\n"
    )
    for probe in (tmp_path / "probe.safetensors", f"{tmp_path / 'probe.py'}:given"):
        ended = moeify("sparsify", llama, tmp_path / "sparse", "--probe", probe)
        assert ended.code == 0, ended.err
        assert "function difference on a probe" in ended.out
        assert "not verified" not in ended.out
    ended = moeify("sparsify", llama, tmp_path / "sparse", "--no-verify")
    assert ended.code == 0
    assert "moeify: not verified: nothing shows" in ended.out


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        ("probe.pt", "neither FILE.safetensors nor FILE.py:FUNCTION"),
        ("none.safetensors", "there is no file"),
        ("probe.py:other", "no function 'other'"),
        ("probe.py:wrong", "cannot be run on the probe"),
    ],
)
def test_a_probe_that_cannot_be_used_is_refused_and_nothing_written(tmp_path, llama, probe, reason):
    (tmp_path / "probe.py").write_text("def wrong():\n    return {'nonsense': 3}\n")
    ended = moeify("sparsify", llama, tmp_path / "sparse", "--probe", tmp_path / probe)
    assert ended.code == 2
    assert re.search(reason, ended.err)
    assert not (tmp_path / "sparse").exists()
