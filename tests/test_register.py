"""Every measured figure in README, docs and changelog comes from a row, and is not rounded in our favour."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FACTS = (("date", "2026-11-29"), ("hardware", "a CPU"))
RESULTS = {"reproduced", "in part", "failed", "run", "not run"}


@pytest.fixture
def register(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "claims")
    import register

    return register


@pytest.fixture
def wrong(register):
    """What is wrong with a text, given ids with a better side, `gain` and `speed`, and one without, `size`."""
    from figures.rows import Figure
    from figures.texts import passages

    known = {
        "gain": [Figure(-0.0342, "x.csv", "", "", "lower", FACTS), Figure(0.0011, "x.csv", "", "", "lower", FACTS)],
        "speed": [Figure(1.288, "x.csv", "", "", "higher", FACTS)],
        "size": [Figure(12.46, "x.csv", "", "", "", FACTS)],
    }

    def of(text: str) -> list[str]:
        used = (
            "\n\n-0.0342 ± 0.0011 <!-- claim: gain -->\n\n1.28 times <!-- claim: speed -->\n\n12.5 <!-- claim: size -->"
        )
        return list(register.faults(list(passages("page.md", text + used)), known))

    return of


def test_every_figure_of_the_texts_is_that_of_its_row(register):
    assert not register.check()


@pytest.mark.parametrize(
    "figure",
    [
        "1.35 times", "as fast: 2 to 3 times", "9.4 %", "27 % and 75 %", "12 ms", "3.7 GiB", "44 tokens per second",
        "5 minutes", "4x", "a loss of 1.7254", "-0.033", "0.7 ± 0.1", "11 of 12 winners", "equal to 1e-6",
        "a correlation of 0.99", "790 TFLOP/s", "0.03 nats", "2 points", "| 1.7254 |", "- item: 0.994",
    ],
)  # fmt: skip
def test_a_measured_figure_without_an_id_is_found(wrong, figure):
    assert "have no id" in wrong(f"It is {figure} here.")[0]


@pytest.mark.parametrize(
    "text",
    [
        "`9.4 %`", "```\n9.4 %\n```", "    9.4 %", "arXiv 2204.09179", "version 0.1.0 of 2026-11-29",
        "[link](1.7254.md)", "k = 2 of 8 experts", "weights of 0.001 and 0.01", "1,024 tokens", "95 % confidence",
        "9.4 % <!-- no claim: published by somebody -->", "<!-- no claims below: aims -->\n\n| 9.4 % |\n\n12 ms",
        "DeepSeek-V3, top-2, 8 bits",
    ],
)  # fmt: skip
def test_settings_code_and_what_is_marked_are_no_measurements(wrong, text):
    assert not wrong(text)


def test_a_heading_ends_what_is_marked_below(wrong):
    assert "12 have no id" in wrong("<!-- no claims below: aims -->\n\n9.4 %\n\n## Next\n\n12 ms\n")[0]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("-0.0342 ± 0.0012 <!-- claim: gain -->", "gain is"),
        ("-0.0343 ± 0.0011 <!-- claim: gain -->", "gain is"),
        ("-0.035 ± 0.002 <!-- claim: gain -->", "gain is"),
        ("1.29 times <!-- claim: speed -->", "speed is"),
        ("1.3 times <!-- claim: speed -->", "speed is"),
        ("1.27 times <!-- claim: speed -->", "speed is"),
        ("12.4 % <!-- claim: size -->", "size is"),
        ("1.28 and 1.44 times <!-- claim: speed -->", "speed is"),
        ("no number <!-- claim: speed -->", "the text has no number"),
        ("1.28 times <!-- claim: other -->", "other has no source"),
        ("9.4 % <!-- no claim: -->", "no reason"),
    ],
)
def test_figures_that_differ_or_flatter_are_found(wrong, text, fault):
    found = wrong(text)
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    "text",
    [
        "-0.034 ± 0.002 <!-- claim: gain -->",
        "-0.0342 ± 0.0011 <!-- claim: gain --> and 1.2 times <!-- claim: speed -->",
        "12 experts, 1.28 times <!-- claim: size, speed -->",
    ],
)  # fmt: skip
def test_figures_rounded_to_the_less_flattering_side_pass(wrong, text):
    assert not wrong(text)


def test_an_id_that_no_text_uses_is_found(register):
    from figures.rows import Figure

    assert list(register.faults([], {"lost": [Figure(1.0, "", "", "", "", FACTS)]})) == [
        "lost has sources, and no text uses it"
    ]


def test_a_figure_without_date_or_hardware_is_found(register):
    from figures.rows import Figure
    from figures.texts import passages

    figure = Figure(1.5, "x.csv", "", "", "", (("date", "2026-11-29"),))
    found = register.faults(list(passages("page.md", "1.5 times <!-- claim: speed -->")), {"speed": [figure]})
    assert list(found) == ["speed does not say its hardware"]


def test_the_register_says_where_a_figure_comes_from(register):
    import json

    gain = json.loads(register.REGISTER.read_text("utf-8"))["claims"]["demo.cpu"]
    assert gain["pages"] == ["README.md"]
    difference = gain["figures"][2]
    assert difference["printed"] == ["-0.0261"]
    assert difference["rows"] == "first_seed=31, at_equal=seconds"
    for field in ("source", "take", "date", "commit", "hardware", "seeds"):
        assert difference[field]


def test_rows_and_quotes_that_are_not_there_are_errors(register):
    from figures.rows import quoted, table

    rows = table("claims/results/upcycling.csv")
    with pytest.raises(ValueError, match="has no row with"):
        rows.where(arm="nobody")
    with pytest.raises(ValueError, match="one was expected"):
        rows.one("loss_at_end")
    with pytest.raises(ValueError, match="cannot be paired"):
        rows.where(arm="copies").minus(rows.where(arm="dense", seed=0), "loss_at_end")
    with pytest.raises(ValueError, match="does not have the words"):
        quoted("docs/log.md", "what nobody has written 12 %", "a CPU")


def test_a_later_run_of_a_seed_replaces_the_one_before(register):
    from figures.rows import Rows

    runs = [("a", 0, 1.0), ("a", 1, 2.0), ("b", 0, 2.0), ("b", 1, 2.0), ("a", 0, 3.0)]
    rows = Rows("x.csv", tuple({"arm": arm, "seed": str(seed), "loss": str(loss)} for arm, seed, loss in runs))
    assert rows.where(arm="a").minus(rows.where(arm="b"), "loss").values == (1.0, 0.0)
    assert rows.last("arm", "seed").values("loss") == [3.0, 2.0, 2.0, 2.0]


def test_every_claim_has_a_row_and_every_row_a_result(register):
    results, small = (ROOT / "docs" / "claims.md").read_text("utf-8").split(register.SMALL)
    rows = [line for line in results.splitlines() if re.match(r"\|.*`\w+\.py`", line)]
    assert {re.split(r" \| ", row)[2].strip("*") for row in rows} <= RESULTS
    for table in (results, small):
        assert not register.unlisted(table)
        assert register.unlisted(table.replace("`harc.py`", "")) == ["harc.py"]
