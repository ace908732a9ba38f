"""`Recipe`: how to make a dense model sparse, as functions and classes, which files write by their names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from moeify import registry
from moeify.experts.base import Experts
from moeify.find.where import Where, ffn
from moeify.given import named
from moeify.routers.base import Router
from moeify.routers.topk import TopK
from moeify.sparsify.make import copies
from moeify.sparsify.shared import nothing


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to make a dense model sparse. Every field but the number is a function or a class; your own will do.

    Attributes:
        where: the model's sites for sparse layers: `ffn`, `every(2)`, `last(2)`, `last_half`, `odd`, `named(regex)`,
            `chosen(...)`.
        num_experts: E.
        router: makes a router from width and number of experts: `partial(TopK, k=2)`.
        decoder_router: makes the routers of decoders, where those of encoders look at later tokens; None for `router`.
        experts: makes experts from the dense module: `copies`, `splits`, `fresh`.
        shared: makes the module that runs beside the experts: `nothing`, `dense`, `frozen`, `gated`.
        memory: makes the module that looks tokens up beside the experts: `nothing`, `engram`.
        after: makes the module that follows the block around a sparse layer: `nothing`, `sandwich`.

    Raises:
        ValueError: no expert at all.
        TypeError: a part that cannot be called, such as its name.
    """

    where: Where = ffn
    num_experts: int = 8
    router: Callable[[int, int], Router] = TopK
    decoder_router: Callable[[int, int], Router] | None = None
    experts: Callable[[nn.Module, int], Experts] = copies
    shared: Callable[[nn.Module, int], nn.Module | None] = nothing
    memory: Callable[[nn.Module, int], nn.Module | None] = nothing
    after: Callable[[nn.Module, int], nn.Module | None] = nothing

    def __post_init__(self) -> None:
        if type(self.num_experts) is not int or self.num_experts < 1:
            raise ValueError(f"num_experts must be a whole number from 1 on, got {self.num_experts!r}")
        for field in dataclasses.fields(self):
            part = getattr(self, field.name)
            if field.name == "num_experts" or part is field.default:
                continue
            if not callable(part) or isinstance(part, nn.Module):
                raise TypeError(
                    f"expected a function or a class as {field.name} of a recipe, but got {named(part)}; names are for "
                    "Recipe.from_dict"
                )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, for JSON.

        Raises:
            ValueError: a part that has no registered name.
        """
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: part if isinstance(part, int) else registry.encode(_kind(name), part)
            for name, part in parts.items()
            if part is not None
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The inverse of `to_dict`.

        Raises:
            ValueError: no mapping; an unknown field, name or option, or a value of another type; the message says what
                is known.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a recipe is a mapping of its fields, and not a {type(values).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"a recipe has no field {key!r}; {registry.suggest(key, known)}")
        return cls(**{k: v if k == "num_experts" else registry.decode(_kind(k), v) for k, v in values.items()})


def _kind(field: str) -> str:
    """The kind under which the registry lists the names for a field of a recipe."""
    return "router" if field == "decoder_router" else field


def recipe_given(recipe: Recipe) -> Recipe:
    """The recipe, as it is.

    Raises:
        TypeError: its name, a dict or anything else that is no recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    way = "Recipe(num_experts=8), for example"
    if isinstance(recipe, str | Path):
        way = f"moeify.sparsify.read_recipe({str(recipe)!r}), for names and files"
    elif isinstance(recipe, dict):
        way = "Recipe.from_dict makes one of a dict"
    raise TypeError(f"expected a Recipe, but got {named(recipe)}; {way}")
