"""A sparse model built from its saved config, without memory for the weights that the files will bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeify.compress.quantize import quantize_as
from moeify.meta import move_parameters_to_meta, parameters_on_meta
from moeify.sparsify.plan import Plan, find
from moeify.sparsify.recipe import Recipe
from moeify.store.weights import persistent


def build(folder: Path, description: dict[str, Any], recipe: Recipe | None, model: nn.Module | None) -> nn.Module:
    """The sparse model that a config describes, with parameters on the meta device wherever its parts allow it.

    Args:
        folder: where the config lies, for messages.
        description: the config.
        recipe: of the sparse model, None if it is dense.
        model: the dense model to start from; one of transformers is built if it is not given.

    Raises:
        ValueError: a model that is not of transformers and was not given, or a config that no model follows.
    """
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
                put(model, name, nn.Parameter(torch.zeros_like(parameter, device="cpu"), parameter.requires_grad))
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


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor into the place of the one that a model has by this name."""
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, tensor)
