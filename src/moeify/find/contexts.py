"""The contexts of sites: one per stack of layers, which reads the arguments of the modules above the stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from moeify import masks
from moeify.context import Context
from moeify.find.shapes import Site


def contexts_of(sites: Sequence[Site]) -> dict[str, Context]:
    """A context for each stack, with the layout of its tokens."""
    return {
        site.stack: Context(False if site.sequence_first else None, routes_padding=site.routes_padding)
        for site in sites
    }


def watch(model: nn.Module, sites: Sequence[Site], contexts: Mapping[str, Context]) -> list[Callable[[], None]]:
    """Let contexts read the arguments of the modules above their stacks; returns functions that remove the hooks."""
    undo: list[Callable[[], None]] = []
    for stack, context in contexts.items():
        around = [layer for site in sites if site.stack == stack if (layer := _around(model, site)) is not None]
        undo += [handle.remove for handle in context.watch(_above(model, stack), list(dict.fromkeys(around)))]
    return undo


def _above(model: nn.Module, stack: str) -> list[nn.Module]:
    """The modules from the model down to what holds a stack of layers."""
    parts = stack.split(".") if stack else []
    return [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) + 1)]


def _around(model: nn.Module, site: Site) -> nn.Module | None:
    """The outermost module of a stack around a site that receives a mask of its tokens, None if none is."""
    parts = site.name.split(".")
    above = len(site.stack.split(".")) if site.stack else 0
    inside = (model.get_submodule(".".join(parts[:end])) for end in range(above + 1, len(parts)))
    return next((module for module in inside if masks.places(module)), None)
