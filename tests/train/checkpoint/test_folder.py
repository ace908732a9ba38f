"""Killed at any file operation, a folder still holds a whole checkpoint, and nothing else once it is tidied up."""

from __future__ import annotations

import os

import pytest

from killing import forks, killed_at_every_operation
from moeify.train.checkpoint.folder import checkpoints, discard, fault, newest, recover, set_aside, writing

NAMES = ("trainer_state.json", "model.safetensors")


def write(folder, content):
    with writing(folder) as inside:
        for name in NAMES:
            (inside / name).write_text(content)


def replace(output):
    write(output / "checkpoint-2", "new")


def rotate(output):
    discard(output / "checkpoint-1")


@forks
@pytest.mark.parametrize("work", [replace, rotate])
def test_a_kill_at_any_file_operation_leaves_a_checkpoint_that_can_be_trusted(tmp_path, work):
    start = tmp_path / "start"
    for step in (1, 2):
        write(start / f"checkpoint-{step}", "old")
    for output, done in killed_at_every_operation(work, start, tmp_path):
        recover(output)
        assert newest(output).name == "checkpoint-2"
        texts = {(output / "checkpoint-2" / name).read_text() for name in NAMES}
        assert texts in ({"old"}, {"new"})
        assert {path.name for path in output.iterdir()} <= {"checkpoint-1", "checkpoint-2"}
        assert all(fault(path) is None for path in checkpoints(output))
        assert not done or texts == {"new" if work is replace else "old"}


def test_what_has_no_name_and_is_not_whole_is_deleted(tmp_path, capsys):
    for suffix in (".tmp", ".trash"):
        write(tmp_path / "checkpoint-3", "x")
        (tmp_path / "checkpoint-3" / NAMES[0]).unlink()
        os.rename(tmp_path / "checkpoint-3", tmp_path / f"checkpoint-3{suffix}")
    (tmp_path / "checkpoint-notes.tmp").mkdir()
    recover(tmp_path)
    assert not list(tmp_path.glob("checkpoint-3*"))
    assert capsys.readouterr().out == ""


def test_what_is_set_aside_gets_a_folder_of_its_own_every_time(tmp_path):
    assert set_aside(tmp_path, -1, "metrics.jsonl") is None
    for number in (1, 2):
        for step in (1, 2):
            write(tmp_path / f"checkpoint-{step}", str(number))
        assert set_aside(tmp_path, 1, "metrics.jsonl") == tmp_path / f"earlier-{number}"
        assert [path.name for path in (tmp_path / f"earlier-{number}").iterdir()] == ["checkpoint-2"]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1"]
