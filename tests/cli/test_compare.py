"""`moeify compare` is `moeify train` over several seeds."""

from __future__ import annotations

import inspect
import json

from command_line import TINY, moeify
from moeify.cli.compare import Compare
from moeify.cli.train import Train
from moeify.evaluate.run import Point, Run
from moeify.evaluate.verdict import verdict
from moeify.evaluate.versus import Versus
from moeify.flops import Count

COUNT = Count(parameters=1, active_parameters=1, flops=1, dense_flops=1)


def test_every_axis_has_a_spread_over_the_seeds(tmp_path, text):
    ended = moeify("compare", *TINY, "--steps", 2, "--seeds", 2, "--data", text, "--output", tmp_path / "run")
    assert ended.code == 0
    assert "over 2 seeds)" in ended.out.splitlines()[-3]
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [(run["name"], run["seed"]) for run in found["runs"]] == [
        ("sparse", 0), ("sparse", 1), ("dense", 0), ("dense", 1)
    ]  # fmt: skip
    assert all(axis["spread"] > 0 and axis["seeds"] == 2 for axis in found["at_equal"].values())


def test_options_differ_from_those_of_train_in_two_defaults_alone():
    ours, theirs = (inspect.signature(name, eval_str=True).parameters for name in (Compare, Train))
    assert [(p.name, p.annotation) for p in ours.values()] == [(p.name, p.annotation) for p in theirs.values()]
    assert {name for name in ours if ours[name].default != theirs[name].default} == {"seeds", "output"}


def test_the_verdict_says_what_the_numbers_say():
    def arm(*losses):
        return [
            Run("", i, COUNT, [Point(0, 0, 0, 0, 9.0), Point(1, 1, 1, 1, loss)], {}) for i, loss in enumerate(losses)
        ]

    assert verdict(Versus(arm(2.0), arm(2.5))).startswith("at equal tokens the sparse model's loss is 0.5000 lower;")
    assert "is 0.2500 higher (± 0.3536 over 2 seeds)" in verdict(Versus(arm(3.0, 3.0), arm(3.0, 2.5)))
