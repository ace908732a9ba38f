"""Every task has a name, settings that are checked, and data of its own that need no download."""

from __future__ import annotations

import json

import pytest
import torch

from command_line import TINY, moeify
from moeify.modes import in_evaluation
from moeify.store import load
from moeify.tasks import TASKS, find_task
from moeify.tasks.base import Shape

SMALL = {"length": 16, "shape": Shape(width=16, layers=2, heads=2, hidden=32)}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_found_by_its_name_and_listed_with_its_score(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    assert find_task(name).name == name
    assert f"{name}, {TASKS[name].line}" in " ".join(moeify("train", "--help").out.replace("│", " ").split())


def test_an_unknown_task_or_setting_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'classify-text'"):
        find_task("clasify-text")
    with pytest.raises(ValueError, match="the task lm has no setting 'txt'; did you mean 'text'"):
        find_task("lm").of({"txt": "body"})


@pytest.mark.parametrize("name", TASKS)
def test_the_data_of_its_own_fit_the_model_of_its_own(name):
    small = SMALL | ({"length": 48} if name == "instruct" else {})  # longer instructions are left out
    setup = find_task(name)(**small).prepare(None, None)
    torch.manual_seed(0)
    model = setup.build()
    batch = setup.objective.collate([setup.train[i] for i in range(4)])
    loss = model(**batch).loss
    assert torch.isfinite(loss)
    loss.backward()
    with in_evaluation(model), torch.no_grad():
        judged = [setup.objective.judge(model, dict(batch)) for _ in range(2)]
    assert judged[0].losses.shape == (4,)
    scores = setup.objective.scores([each.answers for each in judged])
    assert scores
    assert all(isinstance(value, float) for value in scores.values())
    assert setup.train.length > 0
    assert len(setup.validation) >= 4
    assert all(isinstance(text, str) for text in setup.answers(model))


@pytest.mark.parametrize("name", [name for name in TASKS if name != "lm"])
def test_a_run_leaves_a_model_that_loads_and_scores_of_both(name, tmp_path):
    ended = moeify("train", *TINY, "--task", name, "--steps", 2, "--evaluations", 1, "--output", tmp_path / "run")
    assert (ended.code, ended.err) == (0, "")
    load(tmp_path / "run" / "model")
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["facts"]["task"] == name
    assert found["scores"]
    assert found["experts"]
    for run in found["runs"]:
        assert run["scores"].keys() == found["scores"].keys()
