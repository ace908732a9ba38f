"""What takes longer than ten seconds says how long it will go on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moeify import progress
from moeify.evaluate.pace import Cost, Pace, fit
from moeify.evaluate.run import Settings
from moeify.progress import left, with_progress


@pytest.mark.parametrize(("seconds", "lines"), [(1, 0), (4, 1), (11, 3)])
def test_a_line_for_every_ten_seconds_says_what_is_left(monkeypatch, capsys, seconds, lines):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    seen = []
    for item in with_progress("abcd", "reading"):
        seen.append(item)
        now.seconds += seconds
    assert seen == list("abcd")
    told = capsys.readouterr().out.splitlines()
    assert len(told) == lines
    if lines == 3:
        assert told[0] == "reading: 1 of 4, about 33 s left"


def test_minutes_are_said_where_there_are_many_seconds():
    assert (left(10, 1, 9), left(10, 1, 91)) == ("80 s", "15 min")


def pace(step, evaluation=2.0):
    return Pace(Cost([step], [step]), Cost([step], [step]), evaluation=evaluation)


def test_as_many_steps_are_taken_as_fit_into_the_minutes():
    settings = Settings(steps=400, evaluations=10, minutes=7.0)
    assert fit(settings, pace(0.1)) is settings
    slow = fit(settings, pace(1.0))
    assert slow.steps == 140  # 360 s less 24 of validation, at 2 s for a pair of steps, less 24 measured, in tens
    assert fit(settings, pace(1000.0)).steps == 20
    assert fit(Settings(steps=10, minutes=7.0), pace(1000.0)).steps == 10
    assert fit(Settings(steps=400), pace(1000.0)).steps == 400
    assert fit(Settings(steps=45, minutes=float("inf")), pace(1000.0)).steps == 45
