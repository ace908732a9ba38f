"""The table of what was done."""

import io

from rich.console import Console
from torch import nn

from moeify.find import ffn
from moeify.flops import count
from moeify.sparsify import Recipe, dense, fresh, recipes, sparsify
from moeify.sparsify.report import Report
from plain_models import blocks, sparse_layers
from tiny_models import DENSE


def shown(report: Report) -> str:
    file = io.StringIO()
    report.show(Console(file=file, width=300))
    return file.getvalue()


def report(difference: float | None, recipe: Recipe) -> str:
    model = DENSE["t5"]()
    before, sites = count(model), recipe.where(model)
    sparsify(model, recipe, verbose=False)
    layers = list(sparse_layers(model).values())
    return shown(Report(sites=sites, layers=layers, before=before, after=count(model), difference=difference))


def test_every_stack_has_a_row():
    lines = report(0.0, Recipe(num_experts=4)).splitlines()
    for stack in ("encoder.block", "decoder.block"):
        row = next(line for line in lines if stack in line)
        assert "2" in row
        assert "4 of 64 hidden units" in row
        assert "TopK(experts=4, k=2, score=softmax, normalize=True)" in row


def test_shared_experts_are_shown():
    assert "DenseFFN" in report(None, Recipe(num_experts=4, experts=fresh, shared=dense))


def test_a_difference_is_shown_and_so_is_that_there_is_none():
    assert "function difference on a probe: 1.5e-06" in report(1.5e-6, Recipe(num_experts=4))
    assert "not verified" in report(None, Recipe(num_experts=4))


def test_parameters_and_work_are_those_counted():
    model = nn.Sequential(*blocks(2))
    sites, before = ffn(model), count(model)
    sparsify(model, Recipe(num_experts=4), verbose=False)
    after = count(model)
    text = shown(
        Report(sites=sites, layers=list(sparse_layers(model).values()), before=before, after=after, difference=0.0)
    )
    for number in (before.parameters, after.parameters, after.active_parameters, before.flops, after.flops):
        assert f"{number:,.0f}" in text


def test_the_table_is_printed_unless_told_otherwise(capsys):
    sparsify(nn.Sequential(*blocks(2)), Recipe(num_experts=4))
    assert "sparse layers" in capsys.readouterr().out
    sparsify(nn.Sequential(*blocks(2)), Recipe(num_experts=4), verbose=False)
    assert capsys.readouterr().out == ""


def test_a_router_is_shown_with_those_that_it_is_put_around():
    text = report(None, recipes["gshard"])
    for words in ("Capacity(factor=1.25", "priority='choice'", "priority='position'", "GShard(experts=8"):
        assert words in text
