"""Build a sparse model from its saved config on the meta device, without memory for its weights."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from moeify.compress.quantize import quantize_as
from moeify.meta import made_on_meta, move_parameters
from moeify.sparsify.plan import Plan, find
from moeify.store.dtypes import cast_buffers
from moeify.store.local import local_config
from moeify.store.saved import USUAL_LAYERS, Saved


def build(saved: Saved, model: nn.Module | None = None) -> nn.Module:
    """The saved model, with parameters on the meta device wherever its modules allow it.

    Args:
        saved: the config and the headers of the weights.
        model: the dense model to start from; if None, it is built by transformers.

    Raises:
        ValueError: `model` is None and transformers has no such class, or the config is invalid.
    """
    description, recipe = saved.description, saved.recipe
    sites = description.get("sites")
    with _parts_at_most(max(USUAL_LAYERS, 100 * len(saved.weights.shapes)), saved.path):
        if model is None:
            make = partial(_dense, saved.path, description["model"])
            searched = recipe is not None and sites is None  # of an earlier version; a search reads values
            model = None if searched else made_on_meta(make)
            model = make() if model is None else model
        if recipe is None:
            move_parameters(model, "meta")
        else:
            apply_on_meta(find(model, recipe, sites))
        quantize_as(model, description.get("quantization", []))
    cast_buffers(model, description.get("buffers", {}), saved.path)
    return model


def apply_on_meta(plan: Plan) -> None:
    """Insert the sparse layers of a plan into its model, with parameters on the meta device if the layers allow it."""
    move_parameters(plan.model, "meta")
    if made_on_meta(lambda: nn.ModuleList([*plan.layers, *plan.following.values()])) is None:
        move_parameters(plan.model, "cpu")  # for custom layers that read parameter values when built
        plan = replace(plan)  # the copy builds its layers again
    plan.apply(allow_noncausal=True)  # it was allowed when the model was made


def _dense(path: Path, description: dict[str, Any]) -> nn.Module:
    import transformers

    from moeify import models

    saved = str(description.get("class"))
    own = getattr(models, saved.rpartition(".")[2], None) if saved.startswith("moeify.models.") else None
    if own is not None:
        try:
            return own(**description["settings"])
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged: no {own.__name__} can be built of it ({error})") from error
    name = saved.removeprefix("transformers.")
    architecture = getattr(transformers, name, None) if "config" in description else None
    known = isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)
    if not known or architecture.config_class is None:
        raise ValueError(
            f"{path.parent} holds a {saved}, which is not a model of transformers; build the dense model "
            "yourself and pass it: load(folder, model=...)"
        )
    config = local_config(description["config"], path)
    try:
        return architecture(architecture.config_class.from_dict(config))
    except Exception as error:  # models raise any exception for invalid settings
        raise ValueError(
            f"{path} is damaged: no {name} can be built of it ({type(error).__name__}: {error})"
        ) from error


@contextmanager
def _parts_at_most(most: int, path: Path) -> Generator[None]:
    """Limit the number of modules and parameters that are built inside: a damaged config must not build endlessly."""
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
