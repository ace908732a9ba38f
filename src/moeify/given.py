"""`model_given` and `path_given`: what is no model, or no path, is refused with the way to one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")


def model_given(model: T) -> T:
    """The model, as it is.

    Raises:
        TypeError: a path, a class, a dict or anything else that is no module.
    """
    if isinstance(model, nn.Module):
        return model
    way = ""
    if isinstance(model, str | os.PathLike):
        path = os.fspath(model)
        way = f"; load it first, by moeify.load({path!r}) if moeify saved it, or by the from_pretrained of its class"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        way = "; call it first, so that there is a model"
    raise TypeError(f"expected a model, an nn.Module, but got {named(model)}{way}")


def path_given(path: Any) -> Path:
    """A path.

    Raises:
        TypeError: a model or anything else that is no path.
    """
    if isinstance(path, str | os.PathLike) and isinstance(os.fspath(path), str):
        return Path(path)
    raise TypeError(f"expected a path, a str or a Path, but got {named(path)}")


def named(thing: Any) -> str:
    """What a thing is, in an error about it: its type, and the thing itself where it is short."""
    if thing is None:
        return "None"
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    kind = type(thing).__name__
    shown = isinstance(thing, str | int | float | os.PathLike)
    return f"the {kind} {thing!r}" if shown else f"an object of the class {kind}"
