"""Every claim tells how it is run, without running."""

import runpy
import sys
from pathlib import Path

import pytest

CLAIMS = Path(__file__).parents[1] / "claims"
SCRIPTS = sorted(path for path in CLAIMS.glob("*.py") if path.stem != "results")


def run(claim: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.syspath_prepend(str(CLAIMS))
    monkeypatch.setattr(sys, "argv", [str(claim), *arguments])
    runpy.run_path(str(claim), run_name="__main__")


@pytest.mark.parametrize("claim", SCRIPTS, ids=lambda path: path.stem)
def test_a_claim_says_what_it_shows_and_which_options_it_has(claim, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(claim, monkeypatch, "--help")
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: {claim.name}")
    assert f"python claims/{claim.name}" in told


def test_there_are_claims():
    assert len(SCRIPTS) >= 4


def test_peers_that_are_missing_are_said_to_be_and_nothing_is_kept(monkeypatch, capsys):
    before = sorted((CLAIMS / "results").glob("*"))
    run(CLAIMS / "independent.py", monkeypatch, "--python", "nowhere/python", "--vmoe", "nowhere")
    assert capsys.readouterr().out.count("not run (peer missing)") == 3
    assert sorted((CLAIMS / "results").glob("*")) == before


@pytest.mark.parametrize("name", ["placement", "simumax", "smartmoe"])
def test_a_claim_without_the_copy_that_it_compares_with_ends_well_and_keeps_nothing(name, monkeypatch, capsys):
    before = sorted((CLAIMS / "results").glob("*"))
    with pytest.raises(SystemExit) as end:
        run(CLAIMS / f"{name}.py", monkeypatch)
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("not run (peer missing): name ")
    assert sorted((CLAIMS / "results").glob("*")) == before


def test_our_side_of_the_comparison_runs_without_peers(monkeypatch):
    monkeypatch.syspath_prepend(str(CLAIMS))
    ours = runpy.run_path(str(CLAIMS / "peers" / "ours.py"))
    given = ours["inputs"]()
    for name in ("against_vmoe", "against_lucidrains"):
        answers = ours[name](given)
        assert all(value.isfinite().all() for value in answers.values())
        assert answers["top-2/grad router"].count_nonzero()
    answers = ours["against_deepctr"](ours["multi_task_inputs"]())
    assert all(value.isfinite().all() and value.count_nonzero() for value in answers.values())
