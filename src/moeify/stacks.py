"""Stacks of layers: an encoder, a decoder or a tower, whose layers read the same tokens and share one context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.utils.hooks import RemovableHandle

from moeify import masks
from moeify.context import Context


def layer_of(name: str) -> str:
    """The numbered layer that a module is in: its name up to and with the first number, '' if there is none.

    A number of its own, as in a `nn.Sequential`, is no layer.
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def stack_of(name: str) -> str:
    """The stack of layers that a module is in: the name of what holds its numbered layer."""
    return (layer_of(name) or name).rpartition(".")[0]


def watch(model: nn.Module, names: Sequence[str], contexts: Mapping[str, Context]) -> list[RemovableHandle]:
    """Let contexts read the arguments of the modules above their stacks, and the masks of the layers in them.

    Args:
        model: the model.
        names: of the sparse layers.
        contexts: the context of each stack.
    """
    handles: list[RemovableHandle] = []
    for stack, context in contexts.items():
        around = [layer for name in names if stack_of(name) == stack and (layer := _around(model, name)) is not None]
        handles += context.watch(_above(model, stack), list(dict.fromkeys(around)))
    return handles


def _above(model: nn.Module, stack: str) -> list[nn.Module]:
    """The modules from the model down to what holds a stack of layers."""
    parts = stack.split(".") if stack else []
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]


def _around(model: nn.Module, name: str) -> nn.Module | None:
    """The outermost module of a stack around a sparse layer that receives a mask of its tokens, None if none is."""
    parts, stack = name.split("."), stack_of(name)
    above = len(stack.split(".")) if stack else 0
    inside = (model.get_submodule(".".join(parts[:end])) for end in range(above + 1, len(parts)))
    return next((module for module in inside if masks.places(module)), None)
