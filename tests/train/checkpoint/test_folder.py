"""Killed at any file operation, a folder still holds a whole checkpoint, and nothing else once it is tidied up."""

from __future__ import annotations

import multiprocessing
import os
import shutil

import pytest

from moeify.train.checkpoint.folder import checkpoints, discard, fault, newest, recover, set_aside, writing

OPERATIONS = [(os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")]
KILLED = 9


def write(folder, content):
    with writing(folder) as inside:
        for name in ("a", "b"):
            (inside / name).write_text(content)


def replace(output):
    write(output / "checkpoint-2", "new")


def rotate(output):
    discard(output / "checkpoint-1")


def killed(work, output, at):
    """Do some work in a process that dies before its file operation number `at`, if it comes so far."""
    count = 0

    def dying(operation):
        def operate(*arguments, **options):
            nonlocal count
            count += 1
            if count == at:
                os._exit(KILLED)
            return operation(*arguments, **options)

        return operate

    for module, name in OPERATIONS:
        setattr(module, name, dying(getattr(module, name)))
    work(output)
    os._exit(0)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are forked")
@pytest.mark.parametrize("work", [replace, rotate])
def test_a_kill_at_any_file_operation_leaves_a_checkpoint_that_can_be_trusted(tmp_path, work):
    start = tmp_path / "start"
    for step in (1, 2):
        write(start / f"checkpoint-{step}", "old")
    for at in range(1, 100):
        output = shutil.copytree(start, tmp_path / str(at))
        process = multiprocessing.get_context("fork").Process(target=killed, args=(work, output, at))
        process.start()
        process.join()
        recover(output)
        assert newest(output).name == "checkpoint-2", at
        texts = {(output / "checkpoint-2" / name).read_text() for name in ("a", "b")}
        assert texts in ({"old"}, {"new"}), at
        assert {path.name for path in output.iterdir()} <= {"checkpoint-1", "checkpoint-2"}, at
        assert all(fault(path) is None for path in checkpoints(output)), at
        if process.exitcode == 0:
            break
        assert process.exitcode == KILLED
    assert at > 3
    assert texts == {"new" if work is replace else "old"}


def test_what_has_no_name_and_is_not_whole_is_deleted(tmp_path, capsys):
    for suffix in (".tmp", ".trash"):
        write(tmp_path / "checkpoint-3", "x")
        (tmp_path / "checkpoint-3" / "a").unlink()
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
