"""`load`: builds a saved sparse model on the meta device, compares it with the files, and fills in their tensors.

No forward pass is run, and no weight is made that the files then replace.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from moeify.files import read_json
from moeify.folders import finish
from moeify.snapshot import restored_on_error
from moeify.sparsify.recipe import Recipe
from moeify.store.build import build
from moeify.store.config import unfold
from moeify.store.dtypes import REAL
from moeify.store.hashes import check
from moeify.store.weights import Weights


def load(folder: str | Path, model: nn.Module | None = None, recipe: Recipe | None = None) -> nn.Module:
    """Build a saved sparse model again, with parameters in the dtype of the files, in evaluation mode.

    Args:
        folder: what `save` wrote.
        model: the dense model to start from, whose weights are discarded; needed for models that are not of
            transformers. A call that raises leaves it as it was.
        recipe: used in place of the saved one, for recipes with parts of your own.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: a damaged checkpoint, or one of another model; the message names the file or the tensors.
        OSError: a file cannot be read, or an interrupted save cannot be finished.
    """
    folder = Path(folder)
    finish(folder)
    description, recipe, weights = _read(folder, recipe)
    weights.check()
    make = partial(_make, folder, description, recipe, weights)
    return make(None) if model is None else restored_on_error(model, partial(make, model), values=False)


def _make(
    folder: Path, description: dict[str, Any], recipe: Recipe | None, weights: Weights, model: nn.Module | None
) -> nn.Module:
    most = max(_USUAL_LAYERS, 100 * len(weights.shapes))
    with torch.random.fork_rng(devices=[]), _parts_at_most(most, folder / "config.json"):
        model = build(folder, description, recipe, model)
    buffers = _computed_buffers(model, description, folder / "config.json")
    weights.put_into(model, description.get("ties"))
    for buffer, dtype in buffers:
        buffer.data = buffer.to(dtype)
    return model.eval()


def _computed_buffers(model: nn.Module, description: dict[str, Any], path: Path) -> list[tuple[Tensor, torch.dtype]]:
    """The buffers that no file holds, and the dtypes that they had when the model was saved."""
    own, found = dict(model.named_buffers()), []
    for name, dtype in description.get("buffers", {}).items():
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else None
        if name not in own or kind not in REAL:
            raise ValueError(f"{path} is damaged: it says that the buffer {name} is {dtype!r}")
        found.append((own[name], kind))
    return found


def _read(folder: Path, recipe: Recipe | None) -> tuple[dict[str, Any], Recipe | None, Weights]:
    """The config, the recipe that it holds unless another is given, and the headers of the weights, which fit them."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise FileNotFoundError(f"there is no config.json in {folder}: it is not a checkpoint of moeify")
    check(folder, [path])
    description = unfold(read_json(path))
    for key, kind, needed in (
        ("moeify", str, True), ("recipe", (dict, NoneType) if "quantization" in description else dict, True),
        ("model", dict, True), ("quantization", list, False), ("ties", dict, False),
        ("buffers", dict, False), ("sites", list, False),
    ):  # fmt: skip
        if (needed or key in description) and not isinstance(description.get(key), kind):
            raise ValueError(f"{path} has no {key!r}: it was not written by moeify.save")
    if not all(isinstance(kept, str) for kept in description.get("ties", {}).values()):
        raise ValueError(f"{path} is damaged: its 'ties' do not name tensors")
    weights = Weights.of(folder)
    if recipe is None and description["recipe"] is not None:
        recipe = Recipe.from_dict(description["recipe"])
    _check_declared_sizes(path, description, recipe, weights)
    return description, recipe, weights


def _check_declared_sizes(path: Path, description: dict[str, Any], recipe: Recipe | None, weights: Weights) -> None:
    """Compare the sizes that a config names with the headers of the files, before anything is built."""
    most = sum(shape[0] if shape else 1 for shape in weights.shapes.values())
    if recipe is not None and recipe.num_experts > most:
        raise ValueError(
            f"{path} promises {recipe.num_experts} experts, and the files have tensors for {most} at most; one of them "
            "is damaged"
        )
    elements = sum(math.prod(shape) for shape in weights.shapes.values())
    limits = (
        (_STACKED, max(_USUAL_LAYERS, len(weights.shapes))),
        (_COUNTED, max(_USUAL_COUNT, len(weights.shapes))),
        (_WIDTHS, max(_USUAL_WIDTH, elements)),
    )
    for key, value in _numbers(description["model"].get("config")):
        if any(re.search(keys, key) and value > most for keys, most in limits):
            raise ValueError(
                f"{path} promises {key}={value}, and the files have {len(weights.shapes)} tensors of {elements} "
                "numbers in all; one of them is damaged"
            )


_STACKED, _COUNTED = r"(layers?|depths?|blocks?|stages?)$", r"(labels|heads?|experts?|groups?)$"
_WIDTHS = r"hidden|intermediate|vocab|d_model|d_ff|ffn|emb"
_USUAL_LAYERS, _USUAL_COUNT, _USUAL_WIDTH = 10_000, 2**20, 2**24
"""A config also names sizes of parts that a model does not have; up to these, shapes are compared once it is built."""


@contextmanager
def _parts_at_most(most: int, path: Path) -> Generator[None]:
    """Inside, no more modules and parameters are made: a number that is damaged must not keep us busy for ever."""
    made = 0

    def count(*of_whom: Any) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise ValueError(f"{path} describes more than {most} parts, and the files have far fewer tensors")

    hooks = [register_module_parameter_registration_hook(count), register_module_module_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _numbers(values: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a config, also those in lists, by key."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _numbers(value, str(name))
    elif isinstance(values, list):
        for value in values:
            yield from _numbers(value, key)
    elif type(values) in (int, float):
        yield key, values
