"""Every option explains itself, and says what happens without it."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path

import pytest
import typer

from command_line import moeify
from moeify.balance import Proportional, Sign
from moeify.cli import app
from moeify.cli.job import Job
from moeify.cli.options import choose_balance, choose_controller, choose_freeze, choose_losses, choose_recipe
from moeify.cli.train import Train
from moeify.evaluate.run import Settings
from moeify.losses import supervision
from moeify.routers.topk import TopK
from moeify.sparsify import recipes
from moeify.tasks.base import Shape
from moeify.train import SparseArguments

COMMANDS = typer.main.get_command(app).commands
OPTIONS = [
    pytest.param(option, id=f"{name} {option.opts[0]}")
    for name, command in COMMANDS.items()
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


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_that_shows_its_options(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    ended = moeify(name, "--help")
    assert (ended.code, ended.err) == (0, "")
    words = " ".join(ended.out.replace("│", " ").split())
    assert " ".join(inspect.cleandoc(COMMANDS[name].help).split("\n\n")[0].replace("`", "").split()) in words
    for option in COMMANDS[name].params:
        assert option.opts[0] in words
        if isinstance(option.show_default, str):
            assert f"[default: ({option.show_default})]" in words
        elif isinstance(option.default, int | float | Path) and not is_flag(option):
            assert f"[default: {option.default}]" in words


def test_without_arguments_the_verbs_are_listed():
    ended = moeify()
    assert ended.code == 0
    assert all(name in ended.out for name in COMMANDS)


@pytest.mark.parametrize("lower", [Settings, SparseArguments, Shape, Job])
def test_a_setting_has_the_same_default_on_the_command_line_and_in_python(lower):
    def defaults(options):
        return {field.name: field.default for field in fields(options) if field.default is not MISSING}

    chosen = {
        "balance": choose_balance("mixtral", None, None)[0], "learning_rate": Train()._learning_rate,
        "losses": tuple(choose_losses(None)), "freeze": choose_freeze(recipes["matched"], None, None),
    }  # fmt: skip
    here, there = defaults(Train) | chosen, defaults(lower)
    both = here.keys() & there.keys()
    assert len(both) >= 4
    assert {name: here[name] for name in both} == {name: there[name] for name in both}


def test_every_option_reaches_the_job():
    def values(thing):
        inner = {name: part for name, part in vars(thing).items() if not hasattr(part, "__dataclass_fields__")}
        parts = [values(part) for part in vars(thing).values() if hasattr(part, "__dataclass_fields__")]
        return {name: value for each in (inner, *parts) for name, value in each.items()}

    changed = {
        "model": "m", "data": "d", "output": Path("o"), "steps": 40, "batch": 8, "accumulate": 2, "length": 64,
        "learning_rate": 0.5, "weight_decay": 0.25, "balance": 0.125, "scope": "batch", "z": 0.75, "dropout": 0.3,
        "seed": 5, "seeds": 2, "evaluations": 4, "width": 32, "layers": 3, "heads": 2, "hidden": 48, "device": "cpu",
        "resume": True, "progress": False, "minutes": 3.0,
    }  # fmt: skip
    others = {
        "task": "classify-text", "settings": ["label=intent"], "recipe": "olmoe", "experts": 16, "k": 4,
        "controller": "sign", "losses": ["supervision=0.3"], "freeze": ["attention"],
    }  # fmt: skip
    elsewhere = {"config", "print_config", "finetune", "threshold"}  # tests/cli/test_config.py, test_finetune.py
    assert changed.keys() | others.keys() | elsewhere == {field.name for field in fields(Train)}
    job = Train(**changed, **others).job()
    assert changed.items() <= values(job).items()
    assert (job.task.name, job.task.label, job.task.text) == ("classify-text", "intent", "text")
    assert job.settings.freeze == ("attention",)
    assert job.settings.sparse.controller == Sign()
    assert job.settings.sparse.losses == [(0.3, supervision)]
    assert (job.recipe.num_experts, job.recipe.router.keywords["k"]) == (16, 4)


def test_matched_has_a_controller_in_the_place_of_a_loss_unless_told_otherwise():
    assert choose_balance("matched", None, None) == (0.0, Proportional(0.03))
    assert choose_balance("matched", 0.002, None) == (0.002, None)
    assert choose_balance("matched", None, "sign") == (0.01, Sign())
    assert choose_balance("olmoe", None, None) == (0.01, None)
    assert [choose_balance(name, None, None) for name in ("soft", "hash", "peer")] == [(0.0, None)] * 3
    assert Train().job().settings.sparse.describe() == "balance: controller Proportional(rate=0.03, real=None, k=None)"
    assert Train().job().recipe.router(8, 4).selection_bias is not None


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
