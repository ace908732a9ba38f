"""`moeify watch`: what a running and a finished training look like, and how watching ends."""

from __future__ import annotations

import io
import json
import threading
import time

import pytest
from rich.console import Console

from command_line import moeify
from moeify.cli import watch
from moeify.cli.watch import Log, picture, view
from moeify.folders import RUN_LOCK, locked
from moeify.train.run_log import LOG, append


def entry(step, **layers):
    figures = {"step": step, "max_steps": 4, "time": 100.0 + 30 * step, "loss": 2.0 / step, "tokens_per_second": 50.0}
    return figures | ({"max_vio": 0.5, "layers": layers} if layers else {"layers": {}})


def layer(max_vio=0.5, dead=0, rows=(3, 1, 0, 4)):
    return {"max_vio": max_vio, "dead_experts": float(dead), "load_entropy": 0.9, "rows": list(rows)}


def seen(log, **size):
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, **{"width": 100, "height": 30} | size)
    console.print(view(log, console))
    return console.file.getvalue()


def test_a_run_of_moeify_train_is_shown_by_the_entries_of_its_sparse_model(trained):
    folder, _ = trained
    ended = moeify("watch", folder)
    lines = ended.out.splitlines()
    assert (ended.code, ended.err) == (0, "")
    assert lines[0] == str(folder / "sparse-0")
    assert [text.split()[1] for text in lines[1:-1]] == ["1/4", "2/4", "3/4", "4/4"]
    assert all("balance" in text and "MaxVio" in text for text in lines[1:-1])
    assert lines[-1].endswith("the run has ended after step 4 of 4")


def test_it_follows_a_run_until_the_run_ends(tmp_path):
    def run():
        with locked(tmp_path, RUN_LOCK, "is training"):
            started.set()
            for step in (1, 2, 3):
                time.sleep(0.3)
                append(tmp_path / LOG, entry(step, a=layer()))

    started = threading.Event()
    thread = threading.Thread(target=run)
    thread.start()
    started.wait()
    ended = moeify("watch", tmp_path, "--every", "0.1")
    thread.join()
    said = ended.out.splitlines()
    assert [text.split()[1] for text in said[1:-1]] == ["1/4", "2/4", "3/4"]
    assert said[3].endswith("30 s left")
    assert said[-1] == f"{tmp_path}: the run has ended after step 3 of 4"


def test_ctrl_c_leaves_without_a_word(tmp_path, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    append(tmp_path / LOG, entry(1))
    monkeypatch.setattr(watch.time, "sleep", interrupt)
    with locked(tmp_path, RUN_LOCK, "is training"):
        ended = moeify("watch", tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert "ended" not in ended.out


def test_a_folder_without_a_log_is_refused(tmp_path):
    ended = moeify("watch", tmp_path / "nothing")
    assert ended.code == 2
    assert "has no metrics.jsonl, and no process trains into it; name the folder of moeify train" in ended.err


def test_the_view_has_a_row_for_every_layer_that_there_is_room_for(tmp_path):
    append(tmp_path / LOG, entry(2, **{f"layers.{i}": layer(max_vio=i, dead=i % 2) for i in range(20)}))
    log = Log(tmp_path)
    log.look()
    whole, small = seen(log), seen(log, height=13)
    assert whole.count("layers.") == 20
    assert whole.splitlines()[3].split() == ["layer", "load", "of", "its", "experts", "MaxVio", "dead", "entropy"]
    assert "step 2/4  loss 1.0000  50 tokens/s  MaxVio 0.50" in whole
    assert "▆▃ █" in whole
    assert [row.split()[0] for row in small.splitlines() if "layers." in row] == [f"layers.{i}" for i in range(15, 20)]
    assert "15 more layers are loaded more evenly" in small


def test_before_the_first_entry_it_says_that_it_waits(tmp_path):
    assert "waiting for the first log entry" in " ".join(seen(Log(tmp_path)).split())


def test_a_line_is_read_when_it_is_whole_and_again_after_a_resumed_run_cut_the_log_off(tmp_path):
    log, file = Log(tmp_path), tmp_path / LOG
    text = "".join(json.dumps(entry(step)) + "\n" for step in (1, 2, 3))
    file.write_text(text[:-20])
    assert [each["step"] for each in log.look()] == [1, 2]
    file.write_text(text)
    assert [each["step"] for each in log.look()] == [3]
    file.write_text(text.splitlines(keepends=True)[0])
    assert [each["step"] for each in log.look()] == [1]


@pytest.mark.parametrize("experts", [0, 1, 4, 32, 33, 128, 100])
def test_a_picture_of_a_load_has_at_most_its_width(experts):
    drawn = picture([*range(experts)])
    assert len(drawn) <= 32
    assert not experts or drawn.endswith("█" if experts > 1 else " ")
