"""`moeify inspect` writes a page about a run's folder, and says in the terminal what to do first."""

import json

import torch
from safetensors.torch import save_file

from command_line import TINY, moeify
from inspect_routes import random_trace
from moeify import Recipe, save, sparsify
from moeify.inspect.formats import write_trace
from tiny_models import vit


def test_a_run_is_shown_with_its_log_and_its_advice(trained, text, tmp_path):
    folder, _ = trained
    ended = moeify("inspect", folder, "--data", text, "--output", tmp_path / "page.html", "--blocks", 2)
    assert ended.code == 0, ended.err
    page = (tmp_path / "page.html").read_text("utf-8")
    for title in ("Load", "Coloured text", "Causal score", "Training over time"):
        assert f"<h2>{title}</h2>" in page
    assert f"open {tmp_path / 'page.html'}" in ended.out
    assert "experts per layer 8, experts per token 2" in ended.out


def test_numbers_and_advice_come_as_json(trained, text, tmp_path):
    folder, _ = trained
    arguments = ("--data", text, "--output", tmp_path / "page.html", "--blocks", 1, "--no-measure", "--json")
    found = json.loads(moeify("inspect", folder / "model", *arguments).out)
    panels = {panel["title"]: panel for panel in found["panels"]}
    assert "Causal score" not in panels
    assert panels["Load"]["advice"]["action"]
    assert panels["Load"]["rows"][0]["tokens"] == "all"


def test_images_come_as_a_probe(tmp_path):
    model = sparsify(vit(), Recipe(num_experts=4))
    save(model, tmp_path / "vit")
    save_file({"pixel_values": torch.rand(2, 3, 32, 32)}, tmp_path / "images.safetensors")
    ended = moeify("inspect", tmp_path / "vit", "--probe", tmp_path / "images.safetensors")
    assert ended.code == 0, ended.err
    assert "<h2>Image patches</h2>" in (tmp_path / "vit" / "inspect.html").read_text("utf-8")


def test_a_run_of_another_task_is_shown_on_what_was_held_out(tmp_path):
    sizes = [*TINY, "--steps", 2, "--set", "size=16"]
    assert moeify("train", "--task", "classify-image", *sizes, "--output", tmp_path / "run").code == 0
    ended = moeify("inspect", tmp_path / "run", "--blocks", 1, "--no-measure")
    assert ended.code == 0, ended.err
    page = (tmp_path / "run" / "inspect.html").read_text("utf-8")
    for title in ("Image patches", "Specialisation by domain", "Training over time"):
        assert f"<h2>{title}</h2>" in page
    assert moeify("doctor", "--model", tmp_path / "run").code in (1, 3)


def test_a_trace_is_shown_as_a_model_is_less_what_needs_weights(tmp_path):
    write_trace(random_trace(), tmp_path / "trace.safetensors")
    ended = moeify("inspect", tmp_path / "trace.safetensors")
    assert ended.code == 0, ended.err
    assert "Causal score" not in ended.out
    assert "<h2>Top tokens</h2>" in (tmp_path / "inspect.html").read_text("utf-8")


def test_a_streamed_model_is_shown_as_its_trace(trained, text, tmp_path):
    folder, _ = trained
    arguments = ("--data", text, "--output", tmp_path / "page.html", "--blocks", 1, "--json", "--stream")
    found = json.loads(moeify("inspect", folder, *arguments).out)
    panels = {panel["title"]: panel for panel in found["panels"]}
    assert "Causal score" not in panels
    assert panels["Load"]["rows"][0]["tokens"] == "all"


def test_what_is_no_model_is_refused(tmp_path):
    ended = moeify("inspect", tmp_path / "nothing")
    assert ended.code == 2
    assert "no model, run or trace" in ended.err
