"""Every option explains itself, and says what happens without it."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path

import pytest
import typer

from command_line import moeify
from moeify.balance import Sign
from moeify.cli import app
from moeify.cli.options import choose_controller, choose_recipe
from moeify.routers.topk import TopK
from moeify.sparsify import recipes

COMMANDS = typer.main.get_command(app).commands
OPTIONS = [
    pytest.param(option, id=f"{verb} {option.opts[0]}")
    for verb, command in COMMANDS.items()
    for option in command.params
    if option.name != "help"
]


def is_flag(option):
    return getattr(option, "is_flag", False)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_has_a_help_and_says_its_default(option):
    assert len(option.help) >= 8
    assert option.help[0].isupper() or option.help.startswith(("cpu", "0 "))
    assert not option.help.endswith(".")
    assert option.default is not None or option.required or isinstance(option.show_default, str)


def test_no_default_is_said_twice():
    assert not [option.values[0].name for option in OPTIONS if "default" in option.values[0].help]


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_has_a_help_that_shows_its_options(verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    ended = moeify(verb, "--help")
    assert (ended.code, ended.err) == (0, "")
    words = " ".join(ended.out.replace("│", " ").split())
    assert " ".join(inspect.cleandoc(COMMANDS[verb].help).split("\n\n")[0].replace("`", "").split()) in words
    for option in COMMANDS[verb].params:
        assert option.opts[0] in words
        if isinstance(option.show_default, str):
            assert f"[default: ({option.show_default})]" in words
        elif isinstance(option.default, int | float | Path) and not is_flag(option):
            assert f"[default: {option.default}]" in words


def test_without_arguments_the_verbs_are_listed():
    ended = moeify()
    assert ended.code == 0
    assert all(verb in ended.out for verb in COMMANDS)


def test_no_number_leaves_a_recipe_as_it_is():
    assert choose_recipe("olmoe", None, None) is recipes["olmoe"]


def test_k_is_put_into_the_router_and_leaves_its_other_options():
    router = choose_recipe("deepseek", 64, 8).router
    assert isinstance(router, partial)
    assert router.func is TopK
    assert router.keywords["k"] == 8
    assert router.keywords["scale"] == 2.5


def test_a_controller_is_a_name_or_json():
    assert choose_controller("sign") == Sign()
    assert choose_controller('{"name": "sign", "rate": 0.01}') == Sign(rate=0.01)
    assert choose_controller(None) is None
    with pytest.raises(ValueError, match="did you mean 'sign'"):
        choose_controller("sgn")
    with pytest.raises(ValueError, match="not valid JSON"):
        choose_controller('{"name": ')
