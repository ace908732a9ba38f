"""Pictures are drawn from numbers alone, and matplotlib is needed for nothing else."""

from __future__ import annotations

import sys

import pytest
import torch

from moeify.evaluate.run import Point, Run
from moeify.evaluate.versus import Versus
from moeify.flops import Count
from moeify.inspect import ExpertLoad
from moeify.inspect.pictures import draw_load, draw_losses

COUNT = Count(parameters=1, active_parameters=1, flops=1, dense_flops=1)


def arm(name):
    return [Run(name, seed, COUNT, [Point(i, i, i, i, 3.0 - i - seed) for i in range(3)], {}) for seed in range(2)]


LOAD = ExpertLoad(("a", "b"), ("code", "prose"), torch.tensor([[[3.0, 1], [2, 2]], [[0, 4], [4, 0]]]))
DRAW = {
    "losses": lambda file: draw_losses(Versus(arm("sparse"), arm("dense")), file),
    "load": lambda f: draw_load(LOAD, f),
}


def size(picture):
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


@pytest.mark.parametrize("name", DRAW)
def test_a_picture_is_a_png_that_shows_something(tmp_path, name):
    pytest.importorskip("matplotlib")
    DRAW[name](tmp_path / "picture.png")
    width, height = size(tmp_path / "picture.png")
    assert width > 1000
    assert height > 150
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_a_name_is_no_formula_and_may_be_of_another_encoding(tmp_path):
    pytest.importorskip("matplotlib")
    nasty = ("a$\\frac{b$", "caf\udce9")
    draw_load(ExpertLoad(nasty, nasty, LOAD.rows), tmp_path / "picture.png")
    assert size(tmp_path / "picture.png")[0] > 1000


@pytest.mark.parametrize("name", DRAW)
def test_without_matplotlib_the_error_says_how_to_get_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'moeify\[report\]'"):
        DRAW[name](tmp_path / "picture.png")
