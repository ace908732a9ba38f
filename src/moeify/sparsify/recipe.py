"""What to make of a dense model: a recipe of functions and classes, which files write by their names."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from moeify import registry
from moeify.capacity import double, per_choice_by_4, per_token
from moeify.experts.base import Experts
from moeify.routers.base import Router
from moeify.routers.capacity import capacity
from moeify.routers.competition import Compete
from moeify.routers.cosine import Cosine
from moeify.routers.expert_choice import ExpertChoice
from moeify.routers.frozen import Frozen
from moeify.routers.gshard import GShard
from moeify.routers.lookup import Lookup
from moeify.routers.noisy import NoisyTopK
from moeify.routers.once import once
from moeify.routers.residual import Residual
from moeify.routers.sinkhorn import Sinkhorn
from moeify.routers.soft import Soft
from moeify.routers.sparsemixer import SparseMixer
from moeify.routers.topk import Groups, TopK, sigmoid
from moeify.routers.variable import ReLU, TopP
from moeify.sparsify.find import Where, every, ffn, last, last_half, odd
from moeify.sparsify.make import copies, fresh, masked, with_free
from moeify.sparsify.shared import dense, nothing


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to make a dense model sparse. Every field but the number is a function or a class; your own will do.

    Attributes:
        where: the model's sites for sparse layers: `ffn`, `every(2)`, `last(2)`, `last_half`, `odd`, `named(regex)`,
            `chosen(...)`.
        num_experts: E.
        router: makes a router from width and number of experts: `partial(TopK, k=2)`.
        experts: makes experts from the dense module: `copies`, `splits`, `fresh`.
        shared: makes what stands beside the experts: `nothing`, `dense`, `frozen`, `gated`.

    Raises:
        ValueError: no expert at all.
    """

    where: Where = ffn
    num_experts: int = 8
    router: Callable[[int, int], Router] = TopK
    experts: Callable[[nn.Module, int], Experts] = copies
    shared: Callable[[nn.Module, int], nn.Module | None] = nothing

    def __post_init__(self) -> None:
        if type(self.num_experts) is not int or self.num_experts < 1:
            raise ValueError(f"num_experts must be a whole number from 1 on, got {self.num_experts!r}")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, for JSON.

        Raises:
            ValueError: a part that has no registered name.
        """
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: part if isinstance(part, int) else registry.encode(name, part) for name, part in parts.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The inverse of `to_dict`.

        Raises:
            ValueError: an unknown field, name or option; the message says which are known.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"a recipe has no field {key!r}; {registry.suggest(key, known)}")
        return cls(**{k: v if k == "num_experts" else registry.decode(k, v) for k, v in values.items()})


def read_recipe(source: str | Path) -> Recipe:
    """A named recipe, or one from a .json or .toml file.

    Raises:
        ValueError: neither a known name nor a readable recipe file.
        FileNotFoundError: the file is not there.
    """
    path = Path(source)
    if path.suffix not in (".json", ".toml"):
        if str(source) not in recipes:
            near = registry.suggest(str(source), list(recipes))
            raise ValueError(f"no recipe, .json or .toml file is called {str(source)!r}; {near}")
        return recipes[str(source)]
    if not path.is_file():
        raise FileNotFoundError(f"the recipe file {path} does not exist")
    try:
        values = json.loads(path.read_text()) if path.suffix == ".json" else tomllib.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a table of recipe fields, not a {type(values).__name__}")
    return Recipe.from_dict(values)


recipes: dict[str, Recipe] = {
    "matched": Recipe(router=partial(TopK, k=2), experts=partial(fresh, granularity=2)),
    "mixtral": Recipe(router=partial(TopK, k=2)),
    "switch": Recipe(
        where=odd,
        router=partial(
            capacity,
            router=partial(TopK, k=1, normalize=False, jitter=0.01),
            factor=1.25,
            eval_factor=2.0,
            capacity=per_token,
        ),
        experts=fresh,
    ),
    "deepseek": Recipe(
        num_experts=32,
        router=partial(TopK, k=4, score=sigmoid, selection_bias=True, groups=Groups(4, 2, reduce="top2"), scale=2.5),
        experts=partial(fresh, granularity=4),
        shared=dense,
    ),
    "olmoe": Recipe(num_experts=16, router=partial(TopK, k=4, normalize=False), experts=partial(fresh, granularity=4)),
    "phi": Recipe(num_experts=16, router=partial(SparseMixer, k=2), experts=fresh),
    "qwen3": Recipe(num_experts=32, router=partial(TopK, k=4), experts=partial(fresh, granularity=4)),
    "gshard": Recipe(
        where=odd,
        router=partial(capacity, router=GShard, factor=1.25, eval_factor=2.0, capacity=per_token, priority="choice"),
        experts=fresh,
    ),
    "xmoe": Recipe(
        where=odd,
        num_experts=16,
        router=partial(capacity, router=Cosine, factor=1.0, eval_factor=1.0, capacity=double),
        experts=fresh,
    ),
    "vmoe": Recipe(
        where=last(2),
        router=partial(
            capacity,
            router=partial(NoisyTopK, k=2, noise=1 / 8, order="softmax"),
            factor=1.05,
            eval_factor=4.0,
            capacity=per_choice_by_4,
            priority="choice",
        ),
        experts=fresh,
    ),
    "soft": Recipe(where=last_half, num_experts=16, router=Soft, experts=fresh),
    "expert_choice": Recipe(where=odd, router=partial(ExpertChoice, factor=2.0), experts=fresh),
    "topp": Recipe(num_experts=16, router=partial(TopP, p=0.4), experts=partial(fresh, granularity=2)),
    "remoe": Recipe(router=ReLU, experts=fresh),
    "hash": Recipe(router=Lookup, experts=fresh),
    "stmoe": Recipe(
        where=every(4),
        router=partial(capacity, router=GShard, factor=1.25, eval_factor=2.0, capacity=per_token, priority="choice"),
        experts=partial(fresh, variance=0.1),
    ),
    "nllb": Recipe(
        where=every(4),
        router=partial(
            capacity, router=partial(TopK, k=2), factor=1.0, eval_factor=4.0, capacity=double, priority="choice"
        ),
        experts=partial(masked, experts=fresh, p=0.2),
    ),
    "base": Recipe(router=Sinkhorn, experts=fresh),
    "smoe_dropout": Recipe(num_experts=16, router=partial(Frozen, k=8), experts=fresh),
    "competesmoe": Recipe(num_experts=32, router=partial(Compete, k=4), experts=partial(fresh, granularity=4)),
    "moepp": Recipe(num_experts=12, router=partial(Residual, k=2), experts=with_free),
    "mobile_vmoe": Recipe(
        where=last(2),
        num_experts=10,
        router=partial(once, router=partial(TopK, k=1, normalize=False, per="group")),
        experts=fresh,
    ),
}
"""Recipes by the name of the model that they follow, at sizes for a small dense model.

`matched` follows none: new experts half as wide as the dense network, of which a token uses two, so that sparse and
dense model cost the same FLOPs per token. `gshard`, `stmoe`, `nllb`, `base`, `vmoe`, `mobile_vmoe`, `soft` and
`expert_choice` look at later tokens and are for encoders; `hash` reads the model's `input_ids`.
"""
