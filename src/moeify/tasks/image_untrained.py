"""Models that classify images by the name of an architecture, with random weights: timm's need no download."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn
from transformers import AutoModelForImageClassification, TimmWrapperConfig

from moeify.registry import suggest
from moeify.tasks.classify import Classes
from moeify.tasks.image_models import Pixels, pixels_of
from moeify.tasks.models import load_dense

_TIMM = "timm/"


def untrained(model: str, classes: Classes, size: int = 0) -> nn.Module:
    """A model with random weights and a head for the classes, in fp32.

    Args:
        model: `timm/NAME` for an architecture of timm; or a local or hub model of transformers, whose config is read.
        classes: what it is to name.
        size: pixels of a side; 0 for those of the architecture.

    Raises:
        ImportError: timm is missing.
        ValueError: no such architecture, or one that takes no other size.
    """
    config: Any
    if model.startswith(_TIMM):
        found = _of_timm(model)
        changed = {"img_size": size} if size and size != found["input_size"][1] else {}
        given: dict[str, Any] = {"pretrained_cfg": found, "model_args": changed, **classes.config()}
        config = TimmWrapperConfig(architecture=model.removeprefix(_TIMM), **given)
    else:
        config = load_dense(model, "AutoConfig", **classes.config())
        if size:
            config.image_size = size
    try:
        return AutoModelForImageClassification.from_config(config).float()
    except (TypeError, ValueError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{model} cannot be made for images of {size or 'its own'} pixels: {reason}") from error


def pixels_untrained(model: str, size: int = 0) -> Pixels:
    """What `untrained(model, size=size)` reads; raises as it does."""
    if not model.startswith(_TIMM):
        return pixels_of(model, size)
    found = _of_timm(model)
    channels, height, _ = found["input_size"]
    return Pixels(size or height, channels, tuple(found["mean"]), tuple(found["std"]))


def _of_timm(model: str) -> dict[str, Any]:
    try:
        timm: Any = import_module("timm")
    except ImportError as error:
        raise ImportError(f"{model} needs timm and torchvision: pip install timm") from error
    name = model.removeprefix(_TIMM)
    if not timm.is_model(name):
        raise ValueError(f"timm has no architecture {name!r}; {suggest(name, timm.list_models())}")
    found = timm.get_pretrained_cfg(name)
    if found is None:
        raise ValueError(f"timm has no architecture {name!r} with this tag; leave out what follows the point")
    return found.to_dict()
