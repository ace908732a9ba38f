"""Every claim tells how it is run, without running."""

import argparse
import csv
import json
import math
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

CLAIMS = Path(__file__).parents[1] / "claims"
SCRIPTS = sorted(path for path in CLAIMS.glob("*.py") if path.stem not in ("results", "register"))


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
    nowhere = ("--python", "nowhere/python", "--vmoe", "nowhere", "--engram", "nowhere")
    run(CLAIMS / "independent.py", monkeypatch, *nowhere)
    assert capsys.readouterr().out.count("not run (peer missing)") == 4
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


def test_what_is_compared_at_equal_time_is_measured_by_turns():
    """`moeify.evaluate.pace` times both arms alternately, by the CPU where the wall clock is unsteady."""
    equal_time = [
        claim for claim in SCRIPTS if re.search(r"equal (CPU |wall-clock )?(time|seconds)|at_equal", claim.read_text())
    ]
    assert [claim.stem for claim in equal_time] == ["demo"]
    assert all("moeify.evaluate.pace" in claim.read_text() for claim in equal_time)


@pytest.mark.parametrize("is_clear", [True, False])
def test_the_demo_says_where_time_is_too_noisy_to_tell(is_clear, tmp_path, monkeypatch, capsys):
    cost = {"wall": [1.0, 1.0], "cpu": [1.0, 1.0]}
    found = {"sparse": 1.7, "dense": 1.8, "difference": -0.1, "spread": 0.2, "seeds": 3, "is_clear": is_clear}
    summary = {
        "facts": {"threads": 1, "corpus sha256": "0" * 64, "steps": 4, "balance": "none"}, "runs": [{"seed": 31}],
        "pace": {"clock": "CPU", "sparse": cost, "dense": cost, "evaluation": 0.0, "on_cpu": True},
        "at_equal": {"seconds": found},
    }  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    monkeypatch.setenv("MOEIFY_CLAIM_RESULTS", str(tmp_path / "rows"))
    monkeypatch.delitem(sys.modules, "results", raising=False)
    run(CLAIMS / "demo.py", monkeypatch, "--run", str(tmp_path))
    assert ("too noisy to tell" in capsys.readouterr().out) != is_clear
    with (tmp_path / "rows" / "demo.csv").open(newline="") as lines:
        (row,) = csv.DictReader(lines)
    assert (row["clock"], row["step_ratio"], row["clear"]) == ("CPU", "1.000", str(is_clear))
    monkeypatch.delitem(sys.modules, "results", raising=False)


def moved(model: nn.Module, by: float, calls: list[float]) -> nn.Module:
    calls.append(by)
    with torch.no_grad():
        model.weight += by * torch.rand(())
    return model


def test_a_base_is_trained_once_and_what_is_drawn_after_it_is_the_same(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(CLAIMS))
    monkeypatch.setenv("MOEIFY_CACHE", str(tmp_path))
    from common.bases import trained_base

    calls: list[float] = []

    def base(*, by: float = 0.5, width: int = 3, data: float = 1.0, batch: int = 4) -> tuple[nn.Module, float]:
        torch.manual_seed(0)
        learn = partial(moved, by=by, calls=calls)
        model = trained_base(nn.Linear(width, 2), learn, torch.full((2,), data), batch=batch)
        return model, torch.rand(()).item()

    (first, after), (second, after_reading) = base(), base()
    assert calls == [0.5]
    assert (after, first.weight.tolist()) == (after_reading, second.weight.tolist())
    for other in ({"by": 0.25}, {"width": 4}, {"data": 2.0}, {"batch": 8}):
        base(**other)
    assert calls == [0.5, 0.25, 0.5, 0.5, 0.5]
    assert len(list((tmp_path / "claim-bases").iterdir())) == 5


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 40])
def test_few_steps_are_trained_with_a_warm_up(steps, monkeypatch):
    monkeypatch.syspath_prepend(str(CLAIMS))
    from common.training import train

    model = nn.Linear(2, 1)
    before = model.weight.tolist()
    train(model, lambda dice: torch.ones(1, 2), steps, 0, 1e-2, objective=lambda model, ids: model(ids).square().sum())
    assert model.weight.isfinite().all()
    assert model.weight.tolist() != before


@pytest.fixture
def plots(monkeypatch):
    monkeypatch.syspath_prepend(str(CLAIMS))
    from common import plots

    return plots


def test_every_plot_is_shown(plots):
    page = (CLAIMS.parent / "docs/claims.md").read_text("utf-8")
    from common.scatter import SCATTERS

    assert len(plots.PLOTS) >= 6
    for claim in (*plots.PLOTS, *SCATTERS, "independent"):
        assert f"](images/claims/{claim}.svg)" in page
        assert (plots.IMAGES / f"{claim}.svg").is_file()


@pytest.mark.parametrize(("claim", "arms"), [("zero_computation", ["MoE++"]), ("z_loss", ["z 0.001", "z 0.01"])])
def test_a_plot_shows_every_arm_and_the_unit(claim, arms, plots, tmp_path):
    drawn = plots.draw(claim, plots.PLOTS[claim], tmp_path).read_text("utf-8")
    for text in (*arms, plots.PLOTS[claim].unit):
        assert text in drawn


def test_a_plot_is_of_the_arms_and_rows_that_it_names(plots):
    plot = plots.Plot(value="loss", unit="nats", arm="z", against="0.0", arms=["0.01"], where=(("rate", "0.004"),))
    rows = plot.rows("z_loss")
    assert plot.names(rows) == ["0.01"]
    assert {row["rate"] for row in rows.rows} == {"0.004"}


def test_a_plot_with_panels_has_one_for_every_kind(plots, tmp_path):
    drawn = plots.draw("phatgoose_400", plots.PLOTS["phatgoose_400"], tmp_path).read_text("utf-8")
    for base in ("base stories260k", "base own"):
        assert base in drawn
    assert drawn.count("PHATGOOSE with negatives, k=2") == 2


def test_the_picture_of_independent_implementations_shows_every_peer(plots, tmp_path):
    from common import agreement

    drawn = agreement.draw(tmp_path).read_text("utf-8")
    for text in ("vmoe", "lucidrains", "deepctr", "agrees", "differs, explained"):
        assert text in drawn


def test_a_scatter_shows_every_kind_and_both_axes(plots, tmp_path):
    from common.scatter import SCATTERS, draw

    plot = SCATTERS["smartmoe"]
    drawn = draw("smartmoe", plot, tmp_path).read_text("utf-8")
    assert sum(map(len, plot.points("smartmoe").values())) == 12
    for text in ("inky, 16", "pinky, 64", plot.along, plot.upward):
        assert text in drawn


def test_the_picture_of_all_claims_shows_every_one_in_the_colour_of_its_result(plots, tmp_path):
    from common import overview

    drawn = overview.draw(tmp_path).read_text("utf-8")
    assert {overview.verdict(pair.claim) for pair in overview.PAIRS} <= overview.COLOURS.keys()
    for text in (
        *(pair.label for pair in overview.PAIRS),
        *(overview.COLOURS[result] for result in ("reproduced", "failed")),
    ):
        assert text in drawn


@pytest.fixture
def rates(monkeypatch, tmp_path):
    """The rates, of which rows are read from and written to an empty folder."""
    monkeypatch.syspath_prepend(str(CLAIMS))
    from common import rates

    monkeypatch.setitem(rates.append.__globals__, "RESULTS", tmp_path)
    monkeypatch.setattr(rates, "RESULTS", tmp_path)
    return rates


def test_every_arm_gets_the_best_of_the_same_rates_and_keeps_it(rates, tmp_path):
    """Of two arms, one is best in the middle and one at the upper end, for which both get one more rate."""
    bests, tried = {"a": 2e-3, "b": 1.0}, []

    def error(arm: str, rate: float) -> float:
        tried.append((arm, rate))
        return math.nan if (arm, rate) == ("a", 1e-3) else abs(math.log(rate / bests[arm]))

    def of(*options: str, claim: str = "some_claim") -> dict[str, float]:
        parser = argparse.ArgumentParser()
        rates.add_rates(parser, 1e-3)
        parser.set_defaults(steps=5, hardware="a CPU")
        return rates.rates_of(claim, bests, parser.parse_args(options), error, corpus="text")

    assert of() == {"a": 1e-3, "b": 1e-3}
    assert not tried
    with pytest.raises(SystemExit):
        of("--tune")
    assert sorted(tried) == [(arm, rate) for arm in bests for rate in (1e-3, 2e-3, 4e-3, 8e-3)]
    assert of() == {"a": 2e-3, "b": 8e-3}
    assert of("--rate", "0.5") == {"a": 0.5, "b": 0.5}
    assert of(claim="another") == {"a": 1e-3, "b": 1e-3}
    bests["new"] = 1.0
    with pytest.raises(ValueError, match="no rate was tuned for new"):
        of()
    with (tmp_path / "rates.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["rate"] for row in rows if row["chosen"] == "True"] == ["0.002", "0.008"]
    assert {(row["seed"], row["corpus"]) for row in rows} == {("100", "text")}


def test_rates_are_chosen_by_samples_that_are_not_learnt(rates):
    held, learnt = rates.parted(25)
    assert (len(held), len(learnt)) == (2, 23)
    assert sorted([*held.tolist(), *learnt.tolist()]) == list(range(25))


def test_rates_that_were_tuned_are_of_arms_that_are_there():
    with (CLAIMS / "results/rates.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    for claim in {row["claim"] for row in rows}:
        newest = {row["arm"]: float(row["rate"]) for row in rows if (row["claim"], row["chosen"]) == (claim, "True")}
        assert newest.keys() == {row["arm"] for row in rows if row["claim"] == claim}
        assert (CLAIMS / f"{claim}.py").is_file()


def test_a_new_column_is_empty_in_earlier_rows_and_none_may_be_missing(rates, tmp_path):
    rates.append("some", {"arm": "a, b"})
    rates.append("some", {"arm": "c", "corpus": "text"})
    with (tmp_path / "some.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["arm"], row["corpus"]) for row in rows] == [("a, b", ""), ("c", "text")]
    with pytest.raises(ValueError, match="has the columns corpus"):
        rates.append("some", {"arm": "d"})


def test_the_steps_to_a_loss_are_where_the_line_through_its_losses_falls_to_it(monkeypatch):
    monkeypatch.syspath_prepend(str(CLAIMS))
    steps_to = runpy.run_path(str(CLAIMS / "switch_scaling.py"))["steps_to"]
    assert steps_to(2.0, [5.0, 3.0, 1.0, 0.5], 60) == 37.5
    assert steps_to(0.75, [5.0, 3.0, 1.0, 0.5], 60) == 55.0
    assert steps_to(0.4, [5.0, 3.0, 1.0, 0.5], 60) is None
