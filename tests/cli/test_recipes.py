"""`moeify recipes`: one line each, and one recipe whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from command_line import moeify
from moeify.catalogue import USES, catalogue


def test_every_recipe_has_one_line_of_80_columns_under_its_use():
    ended = moeify("recipes")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert max(map(len, lines)) <= 80
    use, seen = "", {}
    for line in lines:
        use = use if line.startswith(" ") else line
        if line.startswith(" "):
            seen[line.split()[0]] = use
    expected = {name + "*" * (not entry.causal): USES[entry.use] for name, entry in catalogue().items()}
    assert seen == expected


@pytest.mark.parametrize("name", catalogue())
def test_a_recipe_is_shown_with_formula_settings_source_and_page(name):
    entry, out = catalogue()[name], moeify("recipes", name).out
    for line in (*entry.formula, entry.source, f"docs/methods/{entry.page}.md", f"num_experts = {entry.num_experts}"):
        assert line in out
    assert max(map(len, out.partition("settings")[0].splitlines())) <= 80


def test_a_nested_setting_has_the_names_of_its_parts():
    out = moeify("recipes", "vmoe").out
    assert 'router.router = "noisy"' in out
    assert "router.router.k = 2" in out


def test_any_spelling_is_found_and_words_are_searched_for():
    assert moeify("recipes", "v-moe").out == moeify("recipes", "V-MoE").out == moeify("recipes", "vmoe").out
    listed = moeify("recipes", "adapters").out
    assert {"arrow", "mole"} <= set(listed.split())
    assert "mixtral" not in listed
    assert moeify("recipes", "sampled top").out.startswith("Phi-3.5-MoE: sampled top-2")
    assert moeify("recipes", "ampled").code == 2  # words are found by their beginning
    ended = moeify("recipes", "mixtrall")
    assert ended.code == 2
    assert "did you mean 'mixtral'" in ended.err


@pytest.mark.parametrize("name", ["MMoE", "ple", "FLAN-MoE", "ESFT"])
def test_methods_under_other_options_are_named_with_these(name):
    ended = moeify("recipes", name)
    assert ended.code == 2
    assert f"{name} is no recipe; moeify train has it as --" in ended.err


def test_json_is_the_catalogue():
    listed = json.loads(moeify("recipes", "--json").out)
    assert [entry["name"] for entry in listed] == list(catalogue())
    (one,) = json.loads(moeify("recipes", "V-MoE", "--json").out)
    assert one["recipe"] == catalogue()["vmoe"].recipe
    assert one["page"] == "noisy"


def test_a_locale_without_utf8_and_a_narrow_terminal_lose_nothing():
    command = [sys.executable, "-c", "from moeify.cli import main; main()", "recipes", "mocle"]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "80"}
    path = os.pathsep.join(filter(None, sys.path))
    ended = subprocess.run(command, capture_output=True, env=os.environ | plain | {"PYTHONPATH": path})
    assert ended.stdout.decode("ascii") == moeify("recipes", "mocle").out
