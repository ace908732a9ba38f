"""A file of options does what the same options would, the command line overrides it, and mistakes are named."""

from __future__ import annotations

import json

import pytest
import typer

from command_line import moeify
from moeify.cli import app
from moeify.cli.config import written
from moeify.cli.train import Train

CHANGED = {
    "task": "classify-image", "settings": ["patch=4", "label=kind"], "losses": ["score_importance=0.005"],
    "recipe": "vmoe", "steps": 7, "learning_rate": 1e-05, "progress": False, "data": "images/",
}  # fmt: skip


def options(*arguments):
    """What the command line makes of them, before anything runs."""
    found = app(["train", *map(str, arguments)], standalone_mode=False)
    assert isinstance(found, Train)
    return found


def write(file, text):
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def test_a_file_gives_the_options_that_it_was_written_of(tmp_path):
    ours = Train(**CHANGED)
    file = write(tmp_path / "job.yaml", written(ours))
    assert vars(options(file)) == vars(ours) | {"config": file}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", 'learning-rate = 1e-3\nsteps = 5\n[set]\ntext = "a.b"\n'),
        ("a.yaml", "learning-rate: 1e-3\nsteps: 5\nset: {text: a.b}\n"),
        ("a.json", json.dumps({"learning_rate": 1e-3, "steps": 5, "set": {"text": "a.b"}})),
    ],
)
def test_the_three_formats_say_the_same_and_flags_override_them(tmp_path, name, text):
    found = options(write(tmp_path / name, text), "--steps", 9)
    assert (found.learning_rate, found.steps, found.settings) == (1e-3, 9, ["text=a.b"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "stpes = 3", "has the key 'stpes', which is no option; did you mean 'steps'"),
        ("a.yaml", "set: 3", "set is a mapping of names to values, not 3"),
        ("a.yaml", "- 3", "holds no options"),
        ("a.yaml", "a: [", "a.yaml cannot be read"),
        ("a.toml", "steps = ", "a.toml cannot be read"),
        ("a.yaml", b"steps: \xff", "a.yaml cannot be read"),
        ("a.txt", "steps = 3", "is none of .yaml, .yml, .toml, .json"),
        ("a.yaml", "steps: many", "Invalid value for '--steps'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path, name, text, message):
    with pytest.raises((ValueError, *typer.BadParameter.__bases__)) as refused:
        options(write(tmp_path / name, text))
    shown = refused.value
    assert message in (shown.format_message() if hasattr(shown, "format_message") else str(shown))


def test_printing_the_options_does_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = moeify("train", "--steps", 3, "--loss", "z=0.001", "--print-config")
    assert ended.code == 0
    assert "steps: 3\n" in ended.out
    assert "loss:\n  z: '0.001'\n" in ended.out
    assert not list(tmp_path.iterdir())


def test_a_loss_has_a_name_and_a_weight():
    for written_as, message in (
        ("supervison=1", "did you mean 'supervision'"),
        ("z=a", "no number"),
        ("z", "NAME=VAL"),
    ):
        ended = moeify("train", "--loss", written_as, "--print-config")
        assert (ended.code, message in ended.err) == (2, True)
