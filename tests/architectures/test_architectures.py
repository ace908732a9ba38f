"""Tiny models of many architectures, made sparse by copies: their function stays, with and without padding, or they are
refused in a sentence."""

import tomllib
from pathlib import Path

import pytest

from architectures.check import batches, changed, outputs, routed
from architectures.inputs import alone, whole
from architectures.shrink import build
from moeify import Recipe, sparsify
from tiny_models import widened

TABLE = tomllib.loads((Path(__file__).parent / "architectures.toml").read_text(encoding="utf-8"))
SAME, REFUSED, OPTIONS = TABLE["same"], TABLE["refused"], TABLE["options"]
UNCOUNTED, UNREAD = TABLE["uncounted"]["architectures"], TABLE["unread"]


def tiny(architecture: str):
    return widened(build(architecture, OPTIONS.get(architecture, {})))


@pytest.mark.parametrize(("architecture", "kind"), SAME.items(), ids=SAME)
def test_copies_change_nothing_and_padding_is_not_routed(architecture, kind):
    model = tiny(architecture)
    given = whole(kind, model)
    calls = batches(model, given)
    before = {side: outputs(model, batch) for side, batch in calls.items()}
    short = outputs(model, alone(given)) if len(calls) > 1 else {}
    sparsify(model, Recipe(num_experts=4), verbose=False)
    for side, batch in calls.items():
        different = changed(before[side], outputs(model, batch), short, side)
        assert different.keys() <= set(UNREAD.get(architecture, []))
    if len(calls) > 1 and architecture not in UNCOUNTED:
        first, second = routed(model, given, half=True), routed(model, alone(given))
        for side, batch in calls.items():
            if side != "whole":
                assert routed(model, batch) == [a + b for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize(("architecture", "words"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_made_sparse_is_refused_in_a_sentence(architecture, words):
    with pytest.raises(ValueError, match=words) as refusal:
        sparsify(tiny(architecture), Recipe(num_experts=4), verbose=False)
    assert "\n" not in str(refusal.value).replace("\\n", "")


def test_there_are_many():
    assert len(SAME) + len(REFUSED) >= 150
