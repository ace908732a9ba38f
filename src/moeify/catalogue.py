"""The catalogue of named recipes: reads the TOML files in `sparsify/recipes` without building a router or model."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A named recipe, as its TOML file describes it.

    Attributes:
        line: what the recipe builds, in one line.
        source: the paper, or `-`.
        causal: whether its router looks at no later token, and so may be used in a decoder.
        recipe: the fields of the recipe, for `Recipe.from_dict`.
        family: the models of transformers whose layout its sparse layers have, None if no family has it.
    """

    line: str
    source: str
    causal: bool
    recipe: dict[str, Any]
    family: str | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.recipe["num_experts"]


@cache
def catalogue() -> dict[str, Entry]:
    """Every named recipe, sorted by name."""
    folder = files("moeify") / "sparsify" / "recipes"
    found = {file.name.removesuffix(".toml"): file for file in folder.iterdir() if file.name.endswith(".toml")}
    return {name: Entry(**tomllib.loads(found[name].read_text(encoding="utf-8"))) for name in sorted(found)}
