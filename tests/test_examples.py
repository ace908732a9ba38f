"""Every example runs, in a folder of its own, and says what it found."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers

from moeify import MoE, registry
from moeify.experts import FFN

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
NEEDS = {"replica_groups": "torchft"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(example, tmp_path, monkeypatch, capsys):
    if example.stem in NEEDS:
        pytest.importorskip(NEEDS[example.stem])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(example)])
    transformers.set_seed(0)
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out


def test_there_are_examples():
    assert len(EXAMPLES) >= 7


def test_a_router_of_your_own_needs_nothing_but_its_class(capsys):
    example = runpy.run_path(str(EXAMPLES[0].parent / "your_own_router.py"))
    deep, model = example["Deep"], example["model"]
    with pytest.raises(ValueError, match="has no name"):
        registry.encode("router", deep)
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    assert [type(layer.router) for layer in layers] == [deep] * 2
    ids = torch.randint(256, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.count_nonzero() for layer in layers for p in layer.router.parameters())
    copied = MoE(deep(8, 4), FFN(4, 8, 6))
    for weight in copied.experts.parameters():
        weight.data.copy_(weight.data[:1].expand_as(weight))
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(copied(x), copied.experts(x.flatten(0, 1), torch.tensor([10, 0, 0, 0])).view(2, 5, 8))
