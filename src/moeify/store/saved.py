"""Read a saved model's config and the headers of its weights, and compare them, before the model is built."""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from moeify.sparsify.recipe import Recipe, recipe_given
from moeify.store.config import unfold
from moeify.store.reading import CONFIG, Weights, open_checkpoint


@dataclass(frozen=True)
class Saved:
    """A saved model whose config and weight headers are verified.

    Attributes:
        path: path of the config, for error messages.
        description: the config.
        recipe: the recipe of the sparse model, None if it is dense.
        weights: the weights, of which only headers are read.
    """

    path: Path
    description: dict[str, Any]
    recipe: Recipe | None
    weights: Weights


@contextmanager
def open_saved(folder: Path, recipe: Recipe | None = None) -> Generator[Saved]:
    """Open a saved model whose config matches the headers of its weights; files are open inside the context.

    Args:
        folder: a folder written by `save`.
        recipe: replaces the recipe in the config.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: a damaged checkpoint; the message names the file.
        OSError: a file cannot be read, or an interrupted save cannot be finished.
    """
    with open_checkpoint(folder) as (config, weights):
        yield _compared(folder / CONFIG, unfold(config), recipe, weights)


def _compared(path: Path, description: dict[str, Any], recipe: Recipe | None, weights: Weights) -> Saved:
    for key, kind, needed in (
        ("moeify", str, True), ("recipe", (dict, NoneType) if "quantization" in description else dict, True),
        ("model", dict, True), ("quantization", list, False), ("ties", dict, False),
        ("buffers", dict, False), ("sites", list, False),
    ):  # fmt: skip
        if (needed or key in description) and not isinstance(description.get(key), kind):
            raise ValueError(f"{path} has no {key!r}: it was not written by moeify.save")
    if not all(isinstance(kept, str) for kept in description.get("ties", {}).values()):
        raise ValueError(f"{path} is damaged: its 'ties' do not name tensors")
    if recipe is not None:
        recipe_given(recipe)
    elif description["recipe"] is not None:
        recipe = Recipe.from_dict(description["recipe"])
    _refuse_sizes(path, description, recipe, weights)
    return Saved(path, description, recipe, weights)


def _refuse_sizes(path: Path, description: dict[str, Any], recipe: Recipe | None, weights: Weights) -> None:
    """Compare the sizes in a config with the headers of the files, before the model is built."""
    most = sum(shape[0] if shape else 1 for shape in weights.shapes.values())
    if recipe is not None and recipe.num_experts > most:
        raise ValueError(
            f"{path} says num_experts={recipe.num_experts}, but the weight files have tensors for at most {most} "
            "experts; one of them is damaged"
        )
    elements = sum(math.prod(shape) for shape in weights.shapes.values())
    limits = (
        (_STACKED, max(USUAL_LAYERS, len(weights.shapes))),
        (_COUNTED, max(_USUAL_COUNT, len(weights.shapes))),
        (_WIDTHS, max(_USUAL_WIDTH, elements)),
    )
    for key, value in _numbers(description["model"].get("config")):
        if any(re.search(keys, key) and value > most for keys, most in limits):
            raise ValueError(
                f"{path} says {key}={value}, but the weight files have {len(weights.shapes)} tensors with "
                f"{elements} elements in total; one of them is damaged"
            )


_STACKED, _COUNTED = r"(layers?|depths?|blocks?|stages?)$", r"(labels|heads?|experts?|groups?)$"
_WIDTHS = r"hidden|intermediate|vocab|d_model|d_ff|ffn|emb"
USUAL_LAYERS, _USUAL_COUNT, _USUAL_WIDTH = 10_000, 2**20, 2**24
"""Limits below which sizes are not rejected here, as a config may have sizes of modules that the model lacks."""


def _numbers(values: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a config, including those in nested configs and lists, with their keys."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _numbers(value, str(name))
    elif isinstance(values, list):
        for value in values:
            yield from _numbers(value, key)
    elif type(values) in (int, float):
        yield key, values
