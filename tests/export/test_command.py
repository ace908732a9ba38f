"""`moeify export` writes what a run saved for transformers, tokenizer included."""

from __future__ import annotations

import json

from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import moeify, save_llama
from moeify import Recipe, export, save, sparsify
from moeify.routers import Soft
from moeify.sparsify.make import fresh
from moeify.tasks.models import load_dense, load_tokenizer, save_tokenizer


def saved(folder, recipe):
    llama = save_llama(folder / "llama")
    save(sparsify(load_dense(str(llama)), recipe, verbose=False, allow_noncausal=True), folder / "run" / "model")
    save_tokenizer(load_tokenizer(str(llama)), folder / "run" / "model")
    return folder / "run"


def test_a_run_is_exported_with_its_tokenizer_and_the_comparison_is_shown(tmp_path):
    ended = moeify("export", saved(tmp_path, Recipe(num_experts=4)), "--output", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[0] == f"{tmp_path / 'out'}: Mixtral (MixtralForCausalLM)"
    assert "MixtralForCausalLM: logits bitwise equal" in ended.out
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1  # a server's account reads all
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("def class")["input_ids"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__ == "MixtralForCausalLM"
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert export.find_exporter("transformers").supports(opened) is None
    again = moeify("export", tmp_path / "out", "--output", tmp_path / "again", "--class", "granitemoeshared")
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "granitemoeshared"


def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path):
    run = saved(tmp_path, Recipe(num_experts=4, router=Soft, experts=fresh))
    ended = moeify("export", run, "--output", tmp_path / "out")
    assert ended.code == 2
    assert "Soft, does not choose the top k" in ended.err
    assert not (tmp_path / "out").exists()
    assert "did you mean 'transformers'" in moeify("export", run, "--to", "transformer").err


def test_options_of_one_target_are_refused_for_another(tmp_path):
    run = saved(tmp_path, Recipe(num_experts=4))
    assert "--type is for --to gguf" in moeify("export", run, "--type", "f16").err
    assert "--class is for" in moeify("export", run, "--to", "mlx", "--class", "mixtral").err
    assert "did you mean 'q8_0'" in moeify("export", run, "--to", "gguf", "--type", "q8").err
