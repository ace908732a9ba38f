"""Recipes by name: those of the literature, at sizes for a small dense model, and those of files."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from moeify import registry
from moeify.catalogue import catalogue, name_of
from moeify.files import read_json
from moeify.sparsify.recipe import Recipe


class _Named(Mapping[str, Recipe]):
    """The named recipes; each is made at first access, and then kept."""

    def __getitem__(self, name: str) -> Recipe:
        return _made(name)

    def __iter__(self) -> Iterator[str]:
        return iter(catalogue())

    def __len__(self) -> int:
        return len(catalogue())


@cache
def _made(name: str) -> Recipe:
    return Recipe.from_dict(catalogue()[name].recipe)


recipes: Mapping[str, Recipe] = _Named()
"""The named recipes, by name."""


def read_recipe(source: str | Path) -> Recipe:
    """A named recipe, its name in any usual spelling, or one from a .json or .toml file.

    Raises:
        ValueError: neither a known name nor a readable recipe file.
        FileNotFoundError: the file is not there.
    """
    path = Path(source)
    if path.suffix not in (".json", ".toml"):
        if (name := name_of(str(source))) is None:
            near = registry.suggest(str(source), list(recipes))
            raise ValueError(f"no recipe, .json or .toml file is called {str(source)!r}; {near}")
        return recipes[name]
    if not path.is_file():
        raise FileNotFoundError(f"the recipe file {path} does not exist")
    if path.suffix == ".json":
        return Recipe.from_dict(read_json(path))
    try:
        return Recipe.from_dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
