"""`moeify train` leaves behind what it promises, from every source of models and text."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest

from command_line import TINY, WORDS, moeify
from moeify.routers import Cluster
from moeify.sparsify import recipes
from moeify.store import load
from nights import nightly


def strict(text):
    """JSON without NaN and infinities."""

    def refuse(name):
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def summary(folder):
    return strict((folder / "summary.json").read_text())


def test_a_run_leaves_model_metrics_summary_pictures_and_report(trained):
    folder, ended = trained
    assert (ended.code, ended.err) == (0, "")
    assert {path.name for path in folder.iterdir()} == {
        "model", "sparse-0", "dense-0", "metrics.jsonl", "summary.json", "loss.png", "experts.png", "report.html",
        "job.json", "pace.json",
    }  # fmt: skip
    load(folder / "model")
    kept = [path.name for path in (folder / "sparse-0").glob("checkpoint-*")]
    assert sorted(kept) == ["checkpoint-3", "checkpoint-4"]  # one to fall back to
    rows = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert (folder / "report.html").read_text().count("data:image/png;base64,") == 2


def test_the_summary_says_what_was_done_and_what_it_cost(trained):
    found = summary(trained[0])
    assert found["facts"]["steps"] == 4
    assert 0 < found["job"]["seconds"] < 600
    assert 10**8 < found["job"]["peak_memory_bytes"] < 10**11
    assert [run["name"] for run in found["runs"]] == ["sparse", "dense"]
    for run in found["runs"]:
        assert run["tokens_per_second"] > 0
        assert [point["step"] for point in run["points"]] == [0, 2, 4]
    assert found["at_equal"]["tokens"]["dense"] == found["runs"][1]["points"][-1]["loss"]
    assert list(found["experts"]) == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_what_is_printed_is_readable_without_a_terminal(trained):
    folder, ended = trained
    lines = ended.out.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 8
    assert re.fullmatch(r"step 1/4  loss [\d.]+  balance [\d.]+  dead \d+  [\d,]+ tokens/s  [\d,]+ s left", steps[0])
    assert "left" not in steps[3]
    assert not any(line.startswith("{") for line in lines)
    assert lines[-1] == f"everything is in {folder}; open {folder / 'report.html'}"
    assert lines[-4].startswith("The sparse model is ")
    assert re.match(r"At equal tokens the sparse model's loss is [\d.]+ (lower|higher); at equal ", lines[-3])
    assert re.match(r"The busiest expert, in model.layers.\d.mlp, takes [\d.]+ times its fair share", lines[-2])


def test_no_progress_means_silence_while_training(tmp_path, text):
    ended = moeify("train", *TINY, "--data", text, "--output", tmp_path / "run", "--no-progress")
    assert ended.code == 0
    assert "step 1/4" not in ended.out
    assert "{'loss'" not in ended.out


OF_EACH_KIND = {"mixtral", "deepseek", "switch", "hash", "moepp", "competesmoe", "mhmoe", "engram", "phatgoose"}
"""One recipe of every kind of options and parts; all of them are trained by tests/train/test_smoke.py."""


def for_text(recipe):
    """Decoders can have its router, and text alone says all that it reads: not the cluster of an instruction."""
    router = recipe.router(8, recipe.num_experts)
    return router.causal and not isinstance(router, Cluster)


@pytest.mark.parametrize(
    "recipe", [name if name in OF_EACH_KIND else nightly(name) for name, recipe in recipes.items() if for_text(recipe)]
)
def test_every_named_recipe_for_decoders_trains(tmp_path, text, recipe):
    options = ["--steps", 2, "--recipe", recipe, *(["--balance", 0] if recipe == "hash" else [])]
    ended = moeify("train", *TINY, *options, "--data", text, "--output", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert summary(tmp_path / "run")["facts"]["steps"] == 2


def test_a_controller_moves_the_selection_biases(tmp_path, text):
    options = ["--recipe", "deepseek", "--controller", "sign", "--steps", 2, "--data", text]
    assert moeify("train", *TINY, *options, "--output", tmp_path / "run").code == 0
    assert load(tmp_path / "run" / "model").model.layers[0].mlp.router.selection_bias.abs().max() > 0


def test_experts_and_k_change_the_recipe(tmp_path, text):
    options = ["--experts", 5, "--k", 3, "--steps", 1, "--data", text, "--output", tmp_path / "run"]
    assert moeify("train", *TINY, *options).code == 0
    router = load(tmp_path / "run" / "model").model.layers[0].mlp.router
    assert (router.num_experts, router.k) == (5, 3)


def test_k_reaches_the_router_inside_another(tmp_path, text):
    options = ["--recipe", "switch", "--k", 2, "--steps", 1, "--data", text, "--output", tmp_path / "run"]
    assert moeify("train", *TINY, *options).code == 0
    recipe = strict((tmp_path / "run" / "model" / "config.json").read_text())["recipe"]
    assert recipe["router"]["router"]["k"] == 2


def test_cutting_a_step_into_micro_batches_changes_rounding_alone(tmp_path, text, trained):
    ended = moeify("train", *TINY, "--accumulate", 2, "--data", text, "--output", tmp_path / "run")
    assert ended.code == 0
    whole, cut = ([run["points"][-1]["loss"] for run in summary(f)["runs"]] for f in (trained[0], tmp_path / "run"))
    assert cut == pytest.approx(whole, abs=1e-3)


def test_the_same_command_gives_the_same_numbers(tmp_path, text, trained):
    assert moeify("train", *TINY, "--data", text, "--output", tmp_path / "run").code == 0
    for one, other in zip(summary(trained[0])["runs"], summary(tmp_path / "run")["runs"], strict=True):
        assert [p["loss"] for p in one["points"]] == [p["loss"] for p in other["points"]]


def test_a_model_of_transformers_goes_on_from_its_own_weights(tmp_path, text, llama):
    ended = moeify("train", *TINY, "--model", llama, "--data", text, "--output", tmp_path / "run")
    assert ended.code == 0, ended.err
    sparse, dense = summary(tmp_path / "run")["runs"]
    assert sparse["points"][0]["loss"] == pytest.approx(dense["points"][0]["loss"], abs=1e-5)  # copies of its FFNs
    written = moeify("generate", tmp_path / "run", "--prompt", "def return", "--tokens", 5, "--temperature", 0)
    assert set(written.out.split()) <= {*WORDS, "[UNK]", "[PAD]", "[EOS]"}


def test_rows_of_json_keep_their_domains(tmp_path, text):
    lines = text.read_text().splitlines()
    rows = [{"text": line, "domain": "even" if i % 2 else "odd"} for i, line in enumerate(lines)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--data", tmp_path / "data.jsonl", "--output", tmp_path / "run", "--steps", 1]
    assert moeify("train", *TINY, *options).code == 0
    assert summary(tmp_path / "run")["runs"][0]["domains"].keys() == {"odd", "even"}


def test_a_folder_has_a_domain_for_each_of_its_folders(tmp_path, text):
    for name in ("code", "prose"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "a.txt").write_text(text.read_text())
    options = ["--data", tmp_path / "data", "--output", tmp_path / "run", "--steps", 1]
    assert moeify("train", *TINY, *options).code == 0
    assert summary(tmp_path / "run")["runs"][0]["domains"].keys() == {"code", "prose"}


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_names_of_domains_end_no_finished_training(tmp_path, text, real_pictures):
    for name in (b"a$\\frac{b$", b"caf\xe9", b"<b>"):
        folder = tmp_path / "data" / os.fsdecode(name)
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(text.read_text())
    options = ["--data", tmp_path / "data", "--output", tmp_path / "run", "--steps", 1]
    ended = moeify("train", *TINY, *options)
    assert (ended.code, ended.err) == (0, "")
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8").count("data:image/png;base64,") == 2
    assert len(summary(tmp_path / "run")["runs"][0]["domains"]) == 3


def test_a_picture_that_cannot_be_drawn_costs_that_picture_alone(tmp_path, text, monkeypatch):
    def fail(*arguments):
        raise TypeError("no glyph")

    monkeypatch.setattr("moeify.cli.job.draw_load", fail)
    ended = moeify("train", *TINY, "--steps", 1, "--data", text, "--output", tmp_path / "run")
    assert ended.code == 0
    assert "moeify: experts.png could not be drawn: no glyph" in ended.out
    assert [path.name for path in (tmp_path / "run").glob("*.png")] == ["loss.png"]
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8").count("data:image/png;base64,") == 1


def test_without_matplotlib_a_run_ends_with_a_word_in_the_place_of_pictures(tmp_path, text, monkeypatch, real_pictures):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    ended = moeify("train", *TINY, "--steps", 1, "--data", text, "--output", tmp_path / "run")
    assert ended.code == 0
    assert (
        "loss.png could not be drawn: pictures need matplotlib; install it with: pip install 'moeify[report]'"
        in ended.out
    )
    assert (tmp_path / "run" / "report.html").is_file()
    assert not list((tmp_path / "run").glob("*.png"))
