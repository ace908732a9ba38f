"""The page of a report loads nothing, escapes what it shows, and stays small."""

import base64
import json
import re

import torch

from inspect_routes import HOSTILE, random_trace
from moe_families import build, inputs
from moeify.inspect import report
from moeify.inspect.panels.charts import UNKNOWN, ColouredText, Heatmap, packed, visible


def page(trace, tmp_path):
    report(trace, file=tmp_path / "page.html")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_page_loads_nothing_and_allows_only_its_own_script_and_style(tmp_path):
    text = page(random_trace(), tmp_path)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    tags = re.findall(r"<[a-z][^>]*>", text)
    assert not [tag for tag in tags if re.search(r"\s(?:src|style|on\w+)=|href=\"(?!#)|https?:", tag)]


def test_hostile_tokens_stay_text(tmp_path):
    text = page(random_trace(), tmp_path)
    assert HOSTILE not in text
    assert "<b>prose" not in text
    assert "\u202e" not in text
    assert text.count("<script") == 2
    assert text.count("</script>") == 2
    data = json.loads(re.search(r'id="charts">(.*?)</script>', text, re.DOTALL)[1])
    assert any("document.title" in token for token in str(data).split())


def test_marks_that_turn_the_direction_are_shown_as_escapes():
    assert visible("a\u202eb\x00c\ud800é漢\n") == "a\\u202eb\\x00c\\ud800é漢\n"


def test_a_page_of_64_layers_and_128_experts_is_below_5_mb_and_says_what_it_leaves_out(tmp_path):
    text = page(random_trace(layers=64, experts=128, k=8, sequences=8, length=24), tmp_path)
    assert len(text.encode()) < 5_000_000
    assert "10 of 64 layers, evenly spread" in text


def test_packed_values_come_back_within_a_step():
    values = torch.tensor([0.0, 1.5, float("nan"), 3.0])
    numbers = torch.frombuffer(bytearray(base64.b64decode(packed(values, 0, 3))), dtype=torch.uint16).tolist()
    assert numbers == [0, 32767, UNKNOWN, UNKNOWN - 1]


def test_weights_above_one_are_kept():
    weights = torch.tensor([[[1.5, 0.5]]])
    chart = ColouredText(tokens=["a"], layers=["0"], experts=torch.tensor([[[0, 1]]]), weights=weights, num_experts=[2])
    assert chart.to_dict()["range"] == [0.5, 1.5]


def test_values_outside_a_heatmap_are_not_numbers_of_json():
    nothing = Heatmap(values=torch.full((1, 2), float("nan")), rows=["a"]).to_dict()
    json.dumps(nothing, allow_nan=False)
    assert nothing["low"] == nothing["high"] == 0


def test_a_report_in_plain_values_is_json(tmp_path):
    made = json.loads(json.dumps(report(random_trace()).to_dict()))
    assert {"Load", "Specialisation by domain", "Coloured text"} <= {panel["title"] for panel in made["panels"]}
    assert any("Soft MoE" in reason for reason in made["missing"])


def test_a_block_whose_decisions_surprise_is_explained():
    model = build("nllb-moe")
    made = report(model, [inputs(model)], measure=False)
    assert "expert 1 once and expert 0" in made.facts["note"]
    assert "note" not in report(random_trace()).facts
