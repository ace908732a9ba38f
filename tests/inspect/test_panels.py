"""Panels give numbers that are known by hand, and no advice where there are no data."""

import math

import pytest
import torch

from inspect_routes import random_trace, trace_of
from moeify.inspect.panels.attributes import Groups, attributes, quoted, script_of
from moeify.inspect.panels.bits import information_bits, units_of
from moeify.inspect.panels.coactivation import together
from moeify.inspect.panels.counting import short_names, spread
from moeify.inspect.panels.coverage import coverage
from moeify.inspect.panels.dead import dead
from moeify.inspect.panels.drops import drops
from moeify.inspect.panels.entropy import entropy
from moeify.inspect.panels.importance import importance
from moeify.inspect.panels.load_by_layer import load_by_layer
from moeify.inspect.panels.margin import margin
from moeify.inspect.panels.panel import NotMeasured
from moeify.inspect.panels.paths import paths
from moeify.inspect.panels.reuse import reuse
from moeify.inspect.panels.specialisation import lift, specialisation
from moeify.inspect.panels.top_tokens import top_tokens
from moeify.inspect.panels.violation import violation
from moeify.inspect.report import report
from moeify.inspect.trace import Tokens


def rows_of(panel):
    return [dict(zip(panel.table.heading, row, strict=True)) for row in panel.table.rows]


def test_load_is_over_the_fair_share_and_prefill_is_apart_from_decoding():
    trace = trace_of([[0], [0], [0], [1]], phase=torch.tensor([0, 0, 0, 1]))
    panel = load_by_layer(trace)
    found = {row["tokens"]: row for row in rows_of(panel)}
    assert found["all"]["its load"] == 3
    assert found["all"]["busiest expert"] == 0
    assert found["decoding"]["its load"] == 4
    assert found["decoding"]["busiest expert"] == 1
    assert list(panel.picture.charts) == ["all", "prefill", "decoding"]
    assert panel.advice.level == "unknown"  # one row per expert


def test_a_collapse_is_named_with_the_experts_that_are_in_use():
    panel = load_by_layer(trace_of([[0], [1]] * 60))
    assert panel.advice.level == "act"
    assert "The routing has collapsed in layers.0.mlp: 2.0 of 4 experts are in use" in panel.advice.finding
    assert "collapsed" not in load_by_layer(trace_of([[0], [1], [2], [3]] * 30)).advice.finding


def test_tokens_ask_for_a_lookup_only_if_they_choose_other_experts_than_each_other():
    ids = torch.arange(120) % 4
    own = top_tokens(trace_of([[int(i)] for i in ids], ids=ids, vocabulary={i: str(i) for i in range(4)}))
    assert own.advice.level == "look"
    one = top_tokens(trace_of([[0] for _ in ids], ids=ids, vocabulary={i: str(i) for i in range(4)}))
    assert one.advice.level == "fine"


def test_a_choice_shows_the_layer_first_that_its_finding_is_about():
    chosen = [[i % 4] for i in range(160)]
    follows = [[i // 40] for i in range(160)]
    sequence = torch.arange(160) // 10
    trace = trace_of(chosen, follows, sequence=sequence, domain=torch.arange(160) // 40, domains=tuple("abcd"))
    (panel,) = specialisation(trace)
    assert panel.picture.charts[1].to_dict()["first"] == 1
    assert "layers.1.mlp" in panel.advice.finding


def test_violation_within_micro_batches_is_apart_from_that_of_the_whole_batch():
    chosen = [[0]] * 40 + [[1]] * 40
    panel = violation(trace_of(chosen, num_experts=2, batch=torch.arange(80) // 40))
    assert panel.table.rows == [("0", 0.0, 1.0)]
    assert panel.advice.level == "fine"


def test_dead_experts_are_named_once_there_are_enough_tokens():
    panel = dead(trace_of([[0], [1]] * 60))
    assert panel.table.rows == [("0", 2, "2, 3")]
    assert panel.advice.level == "act"
    assert "50%" in panel.advice.gain
    assert dead(trace_of([[0], [1]])).advice.level == "unknown"


def test_importance_sums_the_weights_of_an_expert():
    weights = torch.tensor([[0.9, 0.1]] * 30)
    panel = importance(trace_of([[0, 1]] * 30, num_experts=2, weights=weights))
    assert panel.picture.values.tolist()[0] == pytest.approx([1.8, 0.2])
    assert "1 in layers.0.mlp" in panel.advice.finding
    assert panel.advice.level == "look"


def test_entropy_and_margin_are_those_of_the_scores():
    scores = torch.tensor([[0.5, 0.3, 0.2, 0.0]] * 5)
    trace = trace_of([[0, 1]] * 5, scores=scores)
    expected = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2)) / math.log(4)
    assert rows_of(entropy(trace))[0]["mean"] == pytest.approx(expected, abs=1e-3)
    assert rows_of(margin(trace))[0]["median"] == pytest.approx(1 / 3, abs=1e-3)


def test_scores_that_half_precision_rounds_to_zero_are_no_ties():
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.3, 0.2, 0.0]])
    assert rows_of(margin(trace_of([[0, 1]] * 2, scores=scores)))[0]["below 1/256"] == "0.00%"
    with pytest.raises(NotMeasured, match="half precision"):
        margin(trace_of([[0, 1]], scores=scores[:1]))


def test_where_every_token_has_all_experts_only_their_weights_are_shown():
    weights = torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 30)
    made = report(trace_of([[0, 1, 2, 3]] * 30, weights=weights))
    assert [panel.title for panel in made.panels] == ["Importance"]
    (reason,) = [reason for reason in made.missing if "every token has all experts" in reason]
    assert reason.startswith("load, violation, dead experts, coverage")


def test_tokens_are_quoted_and_their_numbers_are_not():
    tokens = Tokens(1, ids=torch.tensor([0]), vocabulary={0: " ", 1: "\n\u202e", 2: "\ufffd"})
    assert [quoted(tokens, i) for i in range(4)] == ["‘ ’", r"‘\n\u202e’", "id 2", "id 3"]


def test_drops_count_rows_and_tokens_that_lost_all_of_theirs():
    dropped = torch.tensor([[True, True], [True, False]])
    panel = drops(trace_of([[0, 1], [0, 1]], dropped=dropped))
    assert panel.table.rows == [("0", "75.00%", "50.00%")]


def test_coverage_is_how_many_experts_take_most_of_the_rows():
    panel = coverage(trace_of([[0]] * 90 + [[1]] * 6 + [[2]] * 4))
    assert panel.table.rows == [("0", 4, 1, 1, 2)]
    assert panel.advice.level == "look"


def test_coactivation_is_one_for_experts_that_are_chosen_at_random_and_more_for_pairs():
    generator = torch.Generator().manual_seed(0)
    free = torch.rand(4000, 6, generator=generator).argsort(1)[:, :2].tolist()
    (layer,) = trace_of(free, num_experts=6)
    assert together(layer)[1][~torch.eye(6, dtype=torch.bool)] == pytest.approx(1, abs=0.15)
    (layer,) = trace_of([[0, 1], [2, 3]] * 50)
    pairs, above = together(layer)
    assert pairs[0, 1] == 50
    assert pairs[0, 2] == 0
    assert above[0, 1] == pytest.approx(3)


def test_paths_tell_a_copied_choice_from_a_shuffled_one():
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(4, (400, 1), generator=generator)
    other = one[torch.randperm(400, generator=generator)]
    panel = paths(trace_of(one.tolist(), one.tolist(), other.tolist()))
    found, chance = (panel.picture.charts[0].series[name] for name in ("found", "shuffled (chance)"))
    assert found[0] == pytest.approx(2, abs=0.05)
    assert found[1] < 0.1 > chance[0]
    assert "100%" in panel.advice.finding
    assert panel.advice.level == "look"


def test_experts_that_stay_in_use_are_counted_within_a_sequence():
    trace = trace_of(
        [[0, 1], [1, 2], [2, 3], [0, 1], [0, 1]], phase=torch.tensor([1, 1, 1, 1, 1]),
        sequence=torch.tensor([0, 0, 0, 1, 1]), step=torch.tensor([1, 2, 3, 1, 2]),
    )  # fmt: skip
    assert reuse(trace).picture.values.tolist() == [[0.75, 0.5]]


def test_information_is_near_that_of_the_groups_and_chance_stays_below_the_interval():
    (layer,) = trace_of([[d] for d in torch.arange(320).div(8).long().remainder(4).tolist()])
    unit = torch.arange(320) // 8
    groups = Groups(("a", "b", "c", "d"), unit % 4)
    found = information_bits(layer, groups, unit)
    assert found.found == pytest.approx(2)
    assert 0 < found.chance < 0.5
    assert found.low > 1
    assert found == information_bits(layer, groups, unit)
    assert lift(layer, groups)[0].tolist() == [4, 0, 0, 0]


def test_information_of_unrelated_groups_is_within_chance():
    generator = torch.Generator().manual_seed(3)
    (layer,) = trace_of(torch.randint(4, (400, 1), generator=generator).tolist())
    unit = torch.arange(400) // 10
    found = information_bits(layer, Groups(("a", "b"), torch.randint(2, (40,), generator=generator)[unit]), unit)
    assert found.low < 0 < found.high


def test_few_sequences_are_cut_into_stretches():
    (layer,) = trace_of([[0]] * 100, sequence=torch.zeros(100, dtype=torch.long))
    assert int(units_of(layer.tokens).max()) + 1 == 25


def test_attributes_leave_out_what_has_one_group():
    (layer,) = trace_of(
        [[0]] * 3, ids=torch.tensor([5, 6, 5]), vocabulary={5: "дом", 6: " 7"}, domain=torch.tensor([0, 0, 0]),
        domains=("one",), position=torch.tensor([0, 1, 5]),
    )  # fmt: skip
    found = attributes(layer.tokens)
    assert set(found) == {"script", "position", "token"}
    assert found["script"].names == ("Cyrillic", "digits")
    assert found["script"].of.tolist() == [0, 1, 0]
    assert found["position"].names == ("0", "1 to 3", "4 to 15")
    assert [script_of(text) for text in (" a", "漢", "!", " ")] == ["Latin", "Cjk", "punctuation", "spaces"]


def test_names_of_layers_lose_what_all_share():
    assert short_names(["model.layers.0.mlp", "model.layers.11.mlp"]) == ["0", "11"]
    assert short_names(["encoder.0.ff", "decoder.0.ff"]) == ["encoder", "decoder"]
    assert short_names(["model.layers.7.mlp"]) == ["7"]
    towers = ["encoder.block.1.layer.1.mlp", "encoder.block.3.layer.1.mlp", "decoder.block.1.layer.2.mlp"]
    assert short_names(towers) == ["encoder.1.1", "encoder.3.1", "decoder.1.2"]
    assert short_names(["layers.0.attention.experts", "layers.0.mlp"]) == ["attention.experts", "mlp"]
    assert spread(64, 3) == [0, 32, 63]
    assert spread(2, 9) == [0, 1]


@pytest.mark.parametrize("panel", [importance, drops, entropy, reuse, paths])
def test_what_was_not_measured_is_said(panel):
    with pytest.raises(NotMeasured):
        panel(trace_of([[0], [1]]))


def test_every_panel_ends_in_an_action_a_gain_and_its_source():
    made = report(random_trace())
    assert len(made.panels) >= 16
    for panel in made.panels:
        assert all((panel.advice.finding, panel.advice.action, panel.advice.gain, panel.advice.source)), panel.title
        assert panel.to_dict()["rows"], panel.title
