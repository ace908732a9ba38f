"""The bounds and the picture of the guide are those that the benchmark computes."""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guide" / "gpu.md").read_text(encoding="utf-8")


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu_roofline

    return gpu_roofline


def test_the_guide_names_the_bounds_of_every_goal(roofline):
    table = {
        line.split()[1]: re.findall(r"([\d.]+) ms \((\d+)\)", line) for line in GUIDE.splitlines() if " ms (" in line
    }
    goals = [goal for goal in roofline.GOALS if not goal.microseconds]
    assert list(table) == [goal.name for goal in goals]
    for goal in goals:
        written = [(float(ms), float(tflops)) for ms, tflops in table[goal.name]]
        bounds = map(roofline.bound, roofline.passes(goal).values())
        found = [(float(f"{ms:.3g}"), round(tflops)) for ms, tflops in bounds]
        assert written == found


def test_no_goal_lies_above_its_bound(roofline):
    for goal in roofline.GOALS:
        passes = roofline.passes(goal)
        assert all(tflops < roofline.bound(passes[name])[1] for name, tflops in roofline.wanted(goal).items())


def test_the_picture_of_the_guide_says_whether_anything_was_measured(roofline):
    picture = roofline.PICTURE.read_text(encoding="utf-8")
    assert f"images/{roofline.PICTURE.name}" in GUIDE
    assert all(f">{goal.name}<" in picture for goal in roofline.GOALS)
    assert ("no GPU has measured" in picture) is not roofline.RESULTS.exists()


def test_the_last_rows_are_drawn(roofline, tmp_path):
    file, columns = tmp_path / "gpu.csv", ["goal", "pass", "implementation", "device", "tflops"]
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerows([columns, *(["G1", "forward", "triton", "H200", tflops] for tflops in (400, 470))])
    assert [row["tflops"] for row in roofline.measured(file)] == ["470"]
    roofline.draw(roofline.measured(file), tmp_path / "new" / "roof.svg")
    assert "Measured on H200" in (tmp_path / "new" / "roof.svg").read_text(encoding="utf-8")
    assert roofline.measured(tmp_path / "none.csv") == []
