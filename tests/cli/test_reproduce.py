"""`moeify reproduce` lists the claims of a checkout, and runs them with rows apart from those that are published."""

from __future__ import annotations

from pathlib import Path

import pytest

import moeify as package
from command_line import moeify
from moeify.cli.reproduce import read_claims

ROOT = Path(__file__).parents[2]
SCRIPT = '''"""A claim that says how it was called.

More.
"""
import os, pathlib, sys

folder = pathlib.Path(os.environ.get("MOEIFY_CLAIM_RESULTS", "claims/results"))
folder.mkdir(parents=True, exist_ok=True)
with (folder / "said.csv").open("a") as rows:
    rows.write(" ".join([pathlib.Path(sys.argv[0]).stem, *sys.argv[1:]]) + "\\n")
sys.exit("wrong" in sys.argv)
'''
RUNS = """
[alone]
minutes = 3
seeds = 3
full = [["--seed", "1"], ["--seed", "2"]]
quick = ["--seed", "1"]
quick_minutes = 1

[slow]
minutes = 90
seeds = 3

[fed]
minutes = 2
seeds = 3
quick = ["--fed"]
quick_minutes = 1
needs = "data"

[compared]
minutes = 1
seeds = 1
quick = []
quick_minutes = 1
needs = "--peer CHECKOUT"
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    claims = tmp_path / "checkout" / "claims"
    claims.mkdir(parents=True)
    (claims / "runs.toml").write_text(RUNS)
    for name in ("alone", "slow", "fed", "compared"):
        (claims / f"{name}.py").write_text(SCRIPT)
    monkeypatch.chdir(claims.parent)
    for name in ("MOEIFY_DATA", "MOEIFY_CLAIM_RESULTS"):
        monkeypatch.delenv(name, raising=False)
    return claims.parent


def said(folder: Path) -> list[str]:
    file = folder / "said.csv"
    return file.read_text().splitlines() if file.exists() else []


def test_the_list_says_what_each_claim_takes(checkout):
    ended = moeify("reproduce")
    assert ended.code == 0
    assert "alone             3 min, 3 seeds; quick: 1 min\n  A claim that says how it was called.\n" in ended.out
    assert "slow              90 min, 3 seeds; quick: none" in ended.out
    assert "needs MOEIFY_DATA" in ended.out
    assert "3 minutes of CPU on one core, with --full 96" in ended.out
    assert not said(checkout / "runs" / "claims")


def test_a_claim_runs_with_all_its_seeds_and_its_rows_are_kept_apart(checkout):
    assert moeify("reproduce", "alone").code == 0
    assert said(checkout / "runs" / "claims") == ["alone --seed 1", "alone --seed 2"]
    assert not said(checkout / "claims" / "results")


def test_options_of_a_claim_are_passed_on_and_rows_recorded_on_request(checkout, tmp_path):
    assert moeify("reproduce", "alone", "--record", "--seeds", "4", "5").code == 0
    assert said(checkout / "claims" / "results") == ["alone --seeds 4 5"]
    assert moeify("reproduce", "compared", "--output", tmp_path / "rows", "--peer", "x").code == 0
    assert said(tmp_path / "rows") == ["compared --peer x"]


def test_all_runs_what_is_quick_and_says_what_is_not_run(checkout):
    ended = moeify("reproduce", "--all")
    assert ended.code == 0
    assert said(checkout / "runs" / "claims") == ["alone --seed 1"]
    for line in (
        "slow: has no quick run", "fed: not run: it reads files of the data folder", "compared: not run: it compares",
    ):  # fmt: skip
        assert line in ended.out


@pytest.mark.parametrize(("needed", "runs"), [("pytest", True), ("not_a_package", False)])
def test_a_claim_that_needs_a_package_runs_where_it_is_installed(checkout, needed, runs, monkeypatch):
    file = checkout / "claims" / "runs.toml"
    file.write_text(file.read_text().replace('needs = "data"', f'needs = "data, {needed}"'))
    monkeypatch.setenv("MOEIFY_DATA", str(checkout))
    ended = moeify("reproduce", "fed")
    assert (ended.code == 0) == runs
    if not runs:
        assert "fed cannot run: not_a_package is not installed: pip install not_a_package" in ended.err


def test_all_in_full_runs_every_seed(checkout, monkeypatch):
    monkeypatch.setenv("MOEIFY_DATA", "somewhere")
    assert moeify("reproduce", "--all", "--full").code == 0
    assert said(checkout / "runs" / "claims") == ["alone --seed 1", "alone --seed 2", "slow", "fed"]


def test_a_claim_that_ends_with_an_error_is_named(checkout):
    ended = moeify("reproduce", "alone", "wrong")
    assert ended.code == 1
    assert "ended with an error: alone" in ended.err


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["alon"], "did you mean 'alone'?"),
        (["fed"], "set MOEIFY_DATA"),
        (["compared"], "name it by --peer CHECKOUT"),
        (["alone", "--all"], "give one of the two"),
        (["--checkout", "elsewhere"], "elsewhere is no checkout"),
    ],
)
def test_bad_input_is_one_line_with_the_way_out(checkout, arguments, error):
    ended = moeify("reproduce", *arguments)
    assert ended.code == 2
    assert error in ended.err
    assert ended.err.count("\n") == 1


def test_without_a_checkout_it_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(package, "__file__", str(tmp_path / "site-packages" / "moeify" / "__init__.py"))
    ended = moeify("reproduce")
    assert ended.code == 2
    assert "clone the repository" in ended.err
    assert ended.err.count("\n") == 1


def test_costs_without_a_program_and_fields_that_are_unknown_are_refused(checkout):
    runs = checkout / "claims" / "runs.toml"
    runs.write_text("[nobody]\nminutes = 1\nseeds = 1\n")
    assert "there is no claims/nobody.py" in moeify("reproduce").err
    runs.write_text("[alone]\nminutes = 1\nseeds = 1\nhours = 2\n")
    assert "alone: " in moeify("reproduce").err


def test_quick_runs_of_all_claims_take_less_than_90_minutes_and_full_ones_have_three_seeds():
    claims = read_claims(ROOT)
    assert claims.keys() == {path.stem for path in (ROOT / "claims").glob("*.py")} - {"register", "results"}
    assert sum(claim.quick_minutes for claim in claims.values()) < 90
    assert all((claim.quick is None) == (claim.quick_minutes == 0) for claim in claims.values())
    assert {name for name, claim in claims.items() if claim.seeds < 3} == {
        "hot_experts", "independent", "placement", "simumax", "smartmoe", "virtual_devices",
    }, "these have no random numbers that matter"  # fmt: skip
