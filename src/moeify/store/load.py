"""`load`: a saved sparse model is built without memory, compared with the files, and given their tensors.

No forward pass is run, and no weight is made that the files then replace.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from moeify.compress.quantize import quantize_as
from moeify.files import read_json
from moeify.meta import move_parameters_to_meta, parameters_on_meta
from moeify.sparsify.plan import Plan, find
from moeify.sparsify.recipe import Recipe
from moeify.store.hashes import check
from moeify.store.weights import Weights, persistent, ties_to_stored


def load(folder: str | Path, model: nn.Module | None = None, recipe: Recipe | None = None) -> nn.Module:
    """Build a saved sparse model again, with parameters in the dtype of the files, in evaluation mode.

    Args:
        folder: what `save` wrote.
        model: the dense model to start from, whose weights are given up; needed for models that are not of
            transformers.
        recipe: used in place of the saved one, for recipes with parts of your own.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: a damaged checkpoint, or one of another model; the message names the file or the tensors.
    """
    folder = Path(folder)
    description = _read_description(folder)
    weights = Weights.of(folder)
    if recipe is None and description["recipe"] is not None:
        recipe = Recipe.from_dict(description["recipe"])
    _refuse_promises(folder / "config.json", description, recipe, weights)
    with torch.random.fork_rng(devices=[]):
        model = _sparse(folder, description, recipe, model)
    own = persistent(model)
    ties = description["ties"] if "ties" in description else ties_to_stored(own, weights)
    weights.refuse_unlike(model, own, ties)
    weights.check()
    _place(model, own, weights, ties)
    for name, dtype in description.get("buffers", {}).items():
        _put(model, name, model.get_buffer(name).to(getattr(torch, dtype)))
    return model.eval()


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no config.json in {folder}: it is not a checkpoint of moeify")
    description = read_json(path)
    check(folder, [path])
    for key, kind, needed in (
        ("moeify", str, True), ("recipe", (dict, NoneType) if "quantization" in description else dict, True),
        ("model", dict, True), ("quantization", list, False), ("ties", dict, False),
        ("buffers", dict, False), ("sites", list, False),
    ):  # fmt: skip
        if (needed or key in description) and not isinstance(description.get(key), kind):
            raise ValueError(f"{path} has no {key!r}: it was not written by moeify.save")
    return description


def _refuse_promises(path: Path, description: dict[str, Any], recipe: Recipe | None, weights: Weights) -> None:
    """Compare what sizes a config names with the headers of the files, before anything is built."""
    most = sum(shape[0] if shape else 1 for shape in weights.shapes.values())
    if recipe is not None and recipe.num_experts > most:
        raise ValueError(
            f"{path} promises {recipe.num_experts} experts, and the files have tensors for {most} at most; one of them "
            "is damaged"
        )
    elements = sum(math.prod(shape) for shape in weights.shapes.values())
    for key, value in _integers(description["model"].get("config")):
        layers = re.search(r"layers?$", key) is not None
        most = max(_USUAL_LAYERS, len(weights.shapes)) if layers else max(_USUAL_WIDTH, elements)
        if (layers or re.search(_WIDTHS, key)) and value > most:
            raise ValueError(
                f"{path} promises {key}={value}, and the files have {len(weights.shapes)} tensors of {elements} "
                "numbers in all; one of them is damaged"
            )


_WIDTHS = r"hidden|intermediate|vocab|d_model|d_ff|ffn|emb"
_USUAL_LAYERS, _USUAL_WIDTH = 10_000, 2**24
"""A config also names sizes of parts that a model does not have; up to these, shapes are compared once it is built."""


def _integers(values: Any, key: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _integers(value, str(name))
    elif type(values) is int:
        yield key, values


def _sparse(folder: Path, description: dict[str, Any], recipe: Recipe | None, model: nn.Module | None) -> nn.Module:
    sites, quantization = description.get("sites"), description.get("quantization", [])
    if recipe is not None and sites is None:  # of an earlier version, which looked for them each time, among values
        model = _dense(folder, description["model"]) if model is None else model
        find(model, recipe).apply(allow_noncausal=True)
        quantize_as(model, quantization)
        return model
    model = _dense_on_meta(folder, description["model"]) if model is None else model
    move_parameters_to_meta(model)
    plan = None if recipe is None or sites is None else Plan.from_sites(model, recipe, sites)
    if plan is not None and not _applied_on_meta(plan):
        for name, parameter in list(persistent(model).items()):
            if parameter.is_meta:
                _put(model, name, nn.Parameter(torch.zeros_like(parameter, device="cpu"), parameter.requires_grad))
        Plan.from_sites(model, plan.recipe, sites or []).apply(allow_noncausal=True)
    with parameters_on_meta():
        quantize_as(model, quantization)
    return model


def _applied_on_meta(plan: Plan) -> bool:
    """Apply a plan, unless a part of the user's own computes with values, or a buffer would lose them."""
    try:
        undo = plan.apply(allow_noncausal=True)  # whoever saved it allowed it
    except (NotImplementedError, RuntimeError):
        return False
    if _lost_buffers(plan.model):
        undo()
        return False
    return True


def _dense_on_meta(folder: Path, description: dict[str, Any]) -> nn.Module:
    """The dense model without memory for parameters, or with it if its buffers cannot be computed otherwise."""
    try:
        with parameters_on_meta():
            model = _dense(folder, description)
        if not _lost_buffers(model):
            return model
    except _NotBuilt:
        pass
    return _dense(folder, description)


class _NotBuilt(ValueError):
    """A config that no model follows."""


def _dense(folder: Path, description: dict[str, Any]) -> nn.Module:
    import transformers

    saved = str(description.get("class"))
    name = saved.removeprefix("transformers.")
    architecture = getattr(transformers, name, None) if "config" in description else None
    known = isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)
    if not known or architecture.config_class is None:
        raise ValueError(
            f"{folder} holds a {saved}, which is not a model of transformers; build the dense model "
            "yourself and pass it: load(folder, model=...)"
        )
    try:
        return architecture(architecture.config_class.from_dict(description["config"]))
    except Exception as error:  # whatever a model raises for settings that it was never tried with
        raise _NotBuilt(
            f"{folder / 'config.json'} is damaged: no {name} can be built of it ({type(error).__name__}: {error})"
        ) from error


def _lost_buffers(model: nn.Module) -> bool:
    """Whether a buffer that no file holds has no values."""
    saved = persistent(model)
    return any(buffer.is_meta for name, buffer in model.named_buffers() if name not in saved)


def _place(model: nn.Module, own: Mapping[str, Tensor], weights: Weights, ties: Mapping[str, str]) -> None:
    """Give every name its tensor, and those that are tied in the files the same one."""
    names: dict[str, list[str]] = {name: [name] for name in weights.shapes}
    for name, kept in ties.items():
        names[kept].append(name)
    for stored, tensor in weights.read():
        old = own[stored]
        new = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        vars(new).update(vars(old))
        for name in names[stored]:
            _put(model, name, new)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, tensor)
