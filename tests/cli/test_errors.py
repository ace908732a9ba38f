"""Bad input ends in one line and code 2; an interrupted run is saved, says how to go on, and comes to the same end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time

import pytest
import torch

from command_line import TINY, moeify, moeify_apart
from moeify.folders import RUN_LOCK, locked


def error(*arguments):
    """The one line that a command ends with."""
    ended = moeify(*arguments)
    assert ended.code == 2, ended
    return re.fullmatch(r"moeify: error: (.+)\n", ended.err)[1]


def refused(tmp_path, text, *options):
    return error("train", *TINY, "--data", text, "--output", tmp_path / "run", *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--recipe mixtrl", "no recipe.* is called 'mixtrl'; .*mixtral"),
        ("--recipe none.json", "the recipe file none.json does not exist"),
        ("--k 9", "k=9 experts per token out of 8 experts; choose 1 <= k <= 8"),
        ("--recipe mixtral --k 1", "k=1 with normalised weights.*pass normalize=False"),
        ("--recipe mixtral --experts 1", "k=2 experts per token out of 1"),
        ("--heads 3", "a width of 16 cannot be divided into 3 heads of even width"),
        ("--heads 16", "a width of 16 cannot be divided into 16 heads of even width"),
        ("--accumulate 3", "4 samples per step cannot be cut into 3 equal micro-batches"),
        ("--scope universe", "scope='universe' is not known; choose from global, batch, sequence"),
        ("--device tpu", "--device must be cpu or cuda, got 'tpu'"),
        ("--length 100000", "the train part has .* tokens in its largest domain, too few for a row of 100000"),
        ("--data nowhere.txt", r"no file or folder nowhere.txt"),
        ("--data no/such", "no file or folder no/such, and the hub did not give it"),
        ("--model no/such", "no model or tokenizer 'no/such' could be loaded"),
        ("--model ./nowhere", "no model or tokenizer './nowhere' could be loaded"),
        ("--learning-rate 1e30", "is not finite in step .*Lower the learning rate"),
        ("--k 0", "Invalid value for '--k'.*1"),
        ("--steps many", "Invalid value for '--steps'"),
        ("--heds 2", "No such option: --heds.*--heads"),
    ],
)
def test_bad_options_of_train_are_refused_in_one_line(tmp_path, text, options, message):
    assert re.match(f".*{message}", refused(tmp_path, text, *options.split()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_no_reason_to_take_the_cpu(tmp_path, text):
    assert "--device cuda: torch finds no GPU" in refused(tmp_path, text, "--device", "cuda")
    (tmp_path / "model").mkdir()
    out = ["--output", tmp_path / "a.jsonl", "--device", "cuda"]
    assert "--device cuda: torch finds no GPU" in error("trace", tmp_path / "model", "--data", text, *out)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ('{"router": {"name": "topk", "kk": 2}}', "router 'topk' has no option 'kk'; did you mean 'k'?"),
        ('{"router": "topq"}', "no router is called 'topq'; did you mean .*'topk'"),
        ('{"num_expert": 4}', "a recipe has no field 'num_expert'.*num_experts"),
        ('{"num_experts": 0}', "num_experts must be a whole number from 1 on, got 0"),
        ('{"num_experts": ', "recipe.json is not valid JSON: "),
        ("[]", "recipe.json must hold a mapping, not a list"),
    ],
)
def test_bad_recipe_files_are_refused_in_one_line(tmp_path, text, recipe, message):
    (tmp_path / "recipe.json").write_text(recipe)
    assert re.match(f".*{message}", refused(tmp_path, text, "--recipe", tmp_path / "recipe.json"))


def test_bad_data_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt is empty: there is no text" in refused(tmp_path, tmp_path / "empty.txt")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"tex')
    assert "bad.jsonl, line 2 is not JSON" in refused(tmp_path, tmp_path / "bad.jsonl")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert "binary.txt is not UTF-8" in refused(tmp_path, tmp_path / "binary.txt")


def test_a_refused_command_can_be_put_right_in_the_same_folder(tmp_path, text):
    assert "choose 1 <= k <= 8" in refused(tmp_path, text, "--k", 9)
    assert moeify("train", *TINY, "--steps", 1, "--data", text, "--output", tmp_path / "run").code == 0


def test_a_folder_in_use_is_refused_in_one_line(tmp_path, text, trained):
    folder = trained[0]
    assert error("train", *TINY, "--data", text, "--output", folder) == (
        f"{folder} is not empty; pass --resume to go on with it, or another --output"
    )
    assert error("train", *TINY, "--data", text, "--output", text) == f"{text} is a file; name a folder for the run"


def test_a_run_goes_on_with_its_own_options_only(text, trained):
    folder = trained[0]
    line = error("train", *TINY, "--data", text, "--output", folder, "--resume", "--steps", 5, "--recipe", "mixtral")
    assert "was begun with recipe {" in line
    assert ", steps 4 instead of 5" in line
    assert line.endswith("; go on with its own options, or in another --output")


def test_damaged_and_missing_models_are_refused_in_one_line(tmp_path, trained, llama):
    assert "there is no config.json in nowhere" in error("generate", "nowhere")
    assert "the prompt is empty" in error("generate", trained[0], "--prompt", "")
    broken = shutil.copytree(trained[0] / "model", tmp_path / "broken")
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[:-8])
    assert "model.safetensors is damaged: it is not what was saved" in error("generate", broken)
    (broken / "config.json").write_text("{")
    assert "config.json is damaged" in error("generate", broken)
    (broken / "SHA256.json").unlink()
    assert "config.json is not valid JSON" in error("generate", broken)
    dense = shutil.copytree(llama, tmp_path / "dense")
    (dense / "model.safetensors").write_bytes(b"nothing")
    for command in (
        ("sparsify", dense, tmp_path / "out"),
        ("train", *TINY, "--model", dense, "--output", tmp_path / "o"),
    ):
        assert f"no model '{dense}' could be loaded" in error(*command)


def test_what_cannot_be_made_sparse_is_refused_in_one_line(tmp_path, llama):
    assert "no model 'no/such' could be loaded" in error("sparsify", "no/such", tmp_path / "out")
    assert "transformers has no model class 'Nope'" in error("sparsify", llama, tmp_path, "--architecture", "Nope")
    assert error("sparsify", llama) == "Missing argument 'output'."
    assert error("sparsfy") == "No such command 'sparsfy'. Did you mean 'sparsify'?"


def test_the_origin_of_an_error_is_shown_to_those_who_ask(tmp_path, text, monkeypatch):
    monkeypatch.setenv("MOEIFY_TRACEBACK", "1")
    with pytest.raises(ValueError, match="is called 'nope'"):
        moeify("train", "--recipe", "nope")


LONG = [*TINY, "--steps", "24", "--evaluations", "4"]


def losses(folder):
    """Every measured loss of both models, and the bits of every logged one of the sparse model."""
    runs = json.loads((folder / "summary.json").read_text())["runs"]
    logs = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [[(p["step"], p["loss"]) for p in run["points"]] for run in runs], [(r["step"], r["loss_hex"]) for r in logs]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert moeify("train", *LONG, "--data", text, "--output", folder).code == 0
    return losses(folder)


def interrupt(number, text, folder, sign):
    """How a run ends that gets a signal as soon as a file is there, and its last words."""
    errors = folder.with_name("errors")
    process = moeify_apart(errors, "train", *LONG, "--data", text, "--output", folder)
    try:
        while not list(folder.glob(sign)):
            assert process.is_alive(), errors.read_text()
            time.sleep(0.01)
        os.killpg(process.pid, number)
        process.join(120)
    finally:
        process.kill()
    return process.exitcode, errors.read_text()


def test_ctrl_c_saves_says_how_to_go_on_and_the_end_is_the_same(tmp_path, text, whole):
    folder = tmp_path / "run"
    code, err = interrupt(signal.SIGINT, text, folder, "sparse-0/metrics.jsonl")
    assert code == 130
    stopped = rf"moeify: stopped after step \d+ of 24, saved in {folder}/(sparse|dense)-0"
    assert re.fullmatch(f"{stopped}; go on with the same command and --resume\n", err)
    assert moeify("train", *LONG, "--data", text, "--output", folder, "--resume").code == 0
    assert losses(folder) == whole


def test_after_a_kill_the_end_is_the_same(tmp_path, text, whole):
    folder = tmp_path / "run"
    code, _ = interrupt(signal.SIGKILL, text, folder, "sparse-0/checkpoint-12")
    assert code == -signal.SIGKILL
    assert moeify("train", *LONG, "--data", text, "--output", folder, "--resume").code == 0
    assert losses(folder) == whole


def test_ctrl_c_beside_the_steps_says_how_to_go_on_as_well(tmp_path, text, monkeypatch):
    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("moeify.cli.job.expert_load", interrupted)
    command = ["train", *TINY, "--data", text, "--output", tmp_path / "run"]
    ended = moeify(*command)
    assert (ended.code, ended.err) == (130, "moeify: interrupted; go on with the same command and --resume\n")
    monkeypatch.undo()
    ended = moeify(*command, "--resume")
    assert ended.code == 0
    assert "step 1/4" not in ended.out


def test_a_second_job_in_the_same_folder_is_refused_and_the_first_is_not_disturbed(tmp_path, text):
    with locked(tmp_path / "run", RUN_LOCK, ""):
        assert re.match("another process is running in .*run .*wait until it ends", refused(tmp_path, text, "--resume"))
        assert [path.name for path in (tmp_path / "run").iterdir()] == [RUN_LOCK]
    assert moeify("train", *TINY, "--steps", 1, "--data", text, "--output", tmp_path / "run").code == 0
