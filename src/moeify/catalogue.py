"""The catalogue of named recipes: reads the TOML files in `sparsify/recipes` without building a router or model."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

USES = {
    "weights": "Keep what the dense model learned",
    "layout": "Language models, laid out as a family of transformers",
    "vision": "Vision, and several modalities",
    "translation": "Encoder-decoders",
    "number": "As many experts as a token needs",
    "balance": "Balanced without a loss",
    "gradient": "More for the router to learn from",
    "adapters": "Adapters as experts",
}
"""What recipes are for: headings of the list, in its order."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A named recipe, as its TOML file describes it.

    Attributes:
        title: the name that the paper uses.
        use: what it is for, one of `USES`.
        line: what the recipe builds, in at most 60 characters of ASCII, as `title` and `formula` are.
        formula: the output y of a layer for a token x, line by line.
        source: the paper, or `-`.
        page: its page of the documentation, `docs/methods/{page}.md`.
        causal: whether its router looks at no later token, and so may be used in a decoder.
        recipe: the fields of the recipe, for `Recipe.from_dict`.
        training: what the paper adds in training: losses, controllers, callbacks; None for nothing.
        family: the models of transformers whose layout its sparse layers have, None if no family has it.
    """

    title: str
    use: str
    line: str
    formula: list[str]
    source: str
    page: str
    causal: bool
    recipe: dict[str, Any]
    training: str | None = None
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


def name_of(spelling: str) -> str | None:
    """The recipe of this name or title, or None; `v-moe`, `V-MoE` and `V MoE` are spellings of `vmoe`."""
    wanted = _letters(spelling)
    return next((name for name, e in catalogue().items() if wanted in (_letters(name), _letters(e.title))), None)


def search(words: str) -> list[str]:
    """The names of the recipes with these words in their name, title, line, family or source; spelling as `name_of`.

    The first word may be the beginning of a word, not its end: `ple` does not find what is sampled.
    """
    wanted = _letters(words)
    texts = {name: (name, e.title, e.line, e.family or "", e.source) for name, e in catalogue().items()}
    return [name for name, text in texts.items() if any(_has(part, wanted) for part in text)]


def _has(text: str, wanted: str) -> bool:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return any("".join(words[i:]).startswith(wanted) for i in range(len(words)))


def _letters(text: str) -> str:
    """Letters and digits alone; a plus counts as a p, as in `moepp` for MoE++."""
    return "".join(letter for letter in text.lower().replace("+", "p") if letter.isalnum())
