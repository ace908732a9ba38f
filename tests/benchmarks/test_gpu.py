"""The benchmark of a GPU goes through all its steps on a CPU."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from moeify.backends import order

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def run(monkeypatch):
    """Runs the benchmark of a GPU on a machine without one."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(order, "_ORDER", list(order._ORDER))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def main(*options):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
        importlib.import_module("gpu").main()

    return main


def test_a_dry_run_checks_every_step_and_measures_nothing(run, capsys):
    results = SCRIPT.parent / "results" / "gpu.csv"
    before = results.read_bytes() if results.exists() else None
    run("--dry-run", "--only", "G1", "G7", "G8 T=1", "--rounds", "2")
    said = capsys.readouterr().out
    assert said.count("not measured") >= 9
    assert " pass" not in said
    assert (results.read_bytes() if results.exists() else None) == before


def test_without_a_gpu_it_says_what_to_do(run, capsys):
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 2
    assert "--dry-run" in capsys.readouterr().err


def test_nothing_is_timed_where_a_check_fails(run, monkeypatch):
    import gpu

    monkeypatch.setattr(gpu, "check", lambda *rest: ["layer silu"])
    monkeypatch.setattr(gpu, "measure", lambda *rest: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="differ from the definition: layer silu"):
        run("--dry-run")


def test_goals_are_judged_by_what_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu

    goal = next(goal for goal in gpu.GOALS if goal.name == "G1")
    rows = [
        {"pass": which, "implementation": name, "median_ms": ms, "tflops": tflops, "kept_mib": kept}
        for which, name, ms, tflops, kept in [
            ("forward", "triton", "5", "495", ""),
            ("forward+backward", "triton", "20", "371", "900"),
            ("forward+backward", "transformers/grouped_mm", "30", "247", "3590"),
        ]
    ]
    found = {what: met for what, _, _, met in gpu.verdicts(goal, rows)}
    assert found == {
        "forward TFLOP/s": True, "both TFLOP/s": False, "times transformers/grouped_mm": True, "kept over P1": True,
    }  # fmt: skip


def test_an_error_is_seen_in_every_gradient(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import gpu_checks

    a, b = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gpu_checks.errors(2 * a, [a], 2 * b, [b]) == 0
    assert gpu_checks.errors(a + a.detach(), [a], 2 * b, [b]) == pytest.approx(0.5)
