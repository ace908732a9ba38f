"""`moeify train --finetune`: a sparse model is fine-tuned as it is, and comes out in the form it went in."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from command_line import WORDS, moeify, save_llama
from moeify.layers import sparse_layers
from moeify.store import load
from tiny_models import mixtral

SMALL = ["--steps", 3, "--length", 32, "--batch", 4, "--evaluations", 1, "--device", "cpu", "--no-progress"]


@pytest.fixture
def native(tmp_path):
    """A tiny Mixtral with a tokenizer of whole words."""
    folder = save_llama(tmp_path / "mixtral")
    mixtral(vocab_size=len(WORDS) + 3).save_pretrained(folder)
    return folder


def changed(before, after):
    before, after = before.state_dict(), after.state_dict()
    differ = [name for name in before if not torch.equal(before[name], after[name])]
    return {n: [e for e in range(len(before[n])) if not torch.equal(before[n][e], after[n][e])] for n in differ}


def test_only_relevant_experts_of_a_model_of_transformers_learn(native, text, tmp_path):
    out = tmp_path / "run"
    ended = moeify("train", "--model", native, "--finetune", "esft", "--data", text, "--output", out, *SMALL,
                   "--learning-rate", 0.01)  # fmt: skip
    assert ended.code == 0, ended.err
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (native, out / "model"))
    summary = json.loads((out / "summary.json").read_text())
    chosen = summary["chosen"]
    assert chosen.keys() == sparse_layers(before).keys()
    names = ("gate_up_proj", "down_proj")
    assert changed(before, after) == {f"{n}.experts.{key}": sorted(e) for n, e in chosen.items() for key in names}
    assert summary["loss_after"] < summary["loss_before"]
    assert f"{summary['trained']:,} of" in ended.out


def test_a_model_of_moeify_is_fine_tuned_and_saved_as_such(tmp_path, llama, text):
    sparse, out = tmp_path / "sparse", tmp_path / "run"
    assert moeify("sparsify", llama, sparse, "--experts", 4).code == 0
    ended = moeify("train", "--model", sparse, "--finetune", "base", "--data", text, "--output", out, *SMALL)
    assert ended.code == 0, ended.err
    before, after = load(sparse), load(out / "model")
    assert not [name for name in changed(before, after) if ".mlp." in name]
    assert changed(before, after)


def test_lora_of_experts_leaves_an_adapter(native, text, tmp_path):
    peft = pytest.importorskip("peft")
    out = tmp_path / "run"
    ended = moeify("train", "--model", native, "--finetune", "esft_lora", "--data", text, "--output", out, *SMALL)
    assert ended.code == 0, ended.err
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(native), out / "adapter")


def test_what_cannot_be_fine_tuned_is_refused(native, llama, text, tmp_path):
    for options, reason in (
        (["--finetune", "esft"], "name it by --model"),
        (["--model", llama, "--finetune", "esft"], "is dense"),
        (["--model", native, "--finetune", "efst"], "did you mean 'esft'"),
        (["--model", native, "--finetune", "esft", "--recipe", "mixtral"], "--recipe does not go with --finetune"),
    ):
        ended = moeify("train", *options, "--data", text, "--output", tmp_path / "run", "--length", 32)
        assert ended.code == 2
        assert reason in ended.err
