"""`moeify doctor` describes the machine that it runs on, and with `--model` says what is wrong with a model."""

from __future__ import annotations

import importlib.util
import json
import platform

import pytest
import torch

import moeify as package
from command_line import moeify
from moeify.backends import backend_names
from moeify.cli import memory
from moeify.data.tokenizer import ByteTokenizer
from moeify.kernels.cpu.cpp import reading
from moeify.tasks.models import save_tokenizer
from tiny_models import mixtral


def rows(out):
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]


def machine(out):
    """The facts of the first table, those on several lines put together."""
    found, what = {}, ""
    for row in rows(out):
        if len(row) == 2:
            what = row[0] or what
            found[what] = f"{found.get(what, '')} {row[1]}".strip()
    return found


def test_versions_and_processor_are_those_of_this_machine():
    ended = moeify("doctor")
    assert (ended.code, ended.err) == (0, "")
    found = machine(ended.out)
    assert found["moeify"] == package.__version__
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert found["freed memory"] == memory.describe()
    assert found["vector instructions"] == torch.backends.cpu.get_cpu_capability()
    assert found["weights of one row"] == reading.explain()


def test_a_missing_package_comes_with_the_extra_that_brings_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else find(name, *a))
    assert "missing matplotlib: pip install 'moeify[report]'" in " ".join(moeify("doctor").out.split())


def test_a_kernel_and_a_backend_are_named_for_every_dtype_with_and_without_a_gradient():
    found = [row for row in rows(moeify("doctor").out) if row[:1] == ["cpu"] and len(row) == 5]
    assert [row[1] for row in found] == ["float32", "bfloat16"]
    assert all(row[2] and row[3] in backend_names() and row[4] in backend_names() for row in found)


def test_a_backend_that_does_not_serve_says_why_and_what_to_install(monkeypatch):
    monkeypatch.setenv("MOEIFY_CPP", "0")
    out = moeify("doctor").out
    words = " ".join(" ".join(row[2] for row in rows(out) if len(row) == 3).split())
    assert "it is switched off by MOEIFY_CPP=0" in words
    assert "it runs on NVIDIA GPUs" in words


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a Mixtral of transformers, and of one whose experts are copies."""
    folder, model = tmp_path_factory.mktemp("models"), mixtral(vocab_size=258)
    for name in ("whole", "copies"):
        model.save_pretrained(folder / name)
        save_tokenizer(ByteTokenizer(), folder / name)
        with torch.no_grad():
            for weights in model.model.layers[1].mlp.experts.parameters():
                weights.copy_(weights[:1].clone().expand_as(weights))
    return folder


def diagnosed(folder, text, *options):
    return moeify("doctor", "--model", folder, "--data", text, "--length", 32, *options)


def test_the_status_says_whether_anything_was_found(saved, text):
    healthy = diagnosed(saved / "whole", text)
    assert (healthy.code, healthy.out.splitlines()[0]) == (0, "nothing was found"), healthy.out
    broken = diagnosed(saved / "copies", text)
    assert broken.code == 1
    assert "identical_experts  the experts never diverged\n  where     model.layers.1.mlp\n" in broken.out
    few = diagnosed(saved / "whole", text, "--tokens", 64)
    assert few.code == 3
    assert "too little data" in few.out


def test_a_diagnosis_can_be_json(saved, text, monkeypatch):
    monkeypatch.setattr("moeify.progress.EVERY", 0.0)
    found = json.loads(diagnosed(saved / "copies", text, "--json").out)
    assert found["status"] == "findings"
    assert [finding["fault"] for finding in found["findings"]] == ["identical_experts"]


def test_data_without_a_model_is_refused(text):
    ended = moeify("doctor", "--data", text)
    assert ended.code == 2
    assert "name the model by --model" in ended.err


def test_the_log_of_a_training_is_diagnosed(tmp_path):
    rows = [[500] * 8, [1200] * 3 + [80] * 5]
    for name, counts in zip(("whole", "collapsed"), rows, strict=True):
        entry = {"loss": 2.0, "layers": {"mlp": {"rows": counts, "balance": 1.0, "drop_rate": 0.0}}}
        lines = [json.dumps(entry | {"step": s, "eval_loss": 2.1}) for s in range(1, 4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    healthy = moeify("doctor", "--log", tmp_path / "whole.jsonl")
    assert (healthy.code, healthy.out.splitlines()[0]) == (0, "nothing was found"), healthy.out
    broken = moeify("doctor", "--log", tmp_path / "collapsed.jsonl")
    assert broken.code == 1
    assert "blind_collapse  the routing has collapsed" in broken.out
    assert moeify("doctor", "--log", tmp_path, "--model", tmp_path).code == 2


def test_a_run_is_diagnosed_on_its_own_data_with_its_log(trained):
    folder, _ = trained
    found = json.loads(moeify("doctor", "--model", folder, "--tokens", 256, "--json").out)
    assert "too little data" in found["unknown"]["collapse"]
    assert {"scaled_loss", "not_finite"} <= {*found["healthy"], *found["unknown"], *found["unchecked"]}
    log = folder / "sparse-0" / "metrics.jsonl"
    whole = log.read_text("utf-8")
    entry = {"step": 5, "loss": float("nan")}
    log.write_text(f"{whole}{json.dumps(entry)}\n", encoding="utf-8")
    try:
        broken = moeify("doctor", "--model", folder, "--tokens", 256)
    finally:
        log.write_text(whole, encoding="utf-8")
    assert broken.code == 1
    assert "not_finite  the training is no longer finite, in the log of the training\n" in broken.out
