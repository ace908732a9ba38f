"""Find the class that computes what a decoder does (`ModelSpec`), exactly or by rewrites that keep the function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from moeify.export.families import EXPERTS, Names
from moeify.export.model_spec import ModelSpec, Unsupported
from moeify.export.rewrites import rewritten
from moeify.export.rules import WriteRule


class Target(Protocol):
    """A target that a model can be expressed as: a class of transformers, or an architecture of llama.cpp."""

    @property
    def title(self) -> str:
        """The display name of the class."""
        ...

    @property
    def rules(self) -> Mapping[str, WriteRule]:
        """How its config stores every trait."""
        ...

    @property
    def names(self) -> Names:
        """Of the tensors of a sparse layer, within the layer; a pair names the gate and the up projection."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Fields that are written as they are."""
        ...


T = TypeVar("T", bound=Target)


@dataclass(frozen=True)
class Match(Generic[T]):
    """A class that computes the same function as a model, with what to write for it.

    Attributes:
        family: the class.
        spec: the model, after all rewrites.
        fields: of the class's configuration.
    """

    family: T
    spec: ModelSpec = field(repr=False)
    fields: Mapping[str, Any] = field(repr=False)

    @property
    def rewrites(self) -> tuple[str, ...]:
        """What was rewritten; empty for an exact match."""
        return self.spec.rewrites

    def tensors(self, layer: str = "model.layers.{}.") -> dict[str, Tensor]:
        """The tensors by the names of the class.

        Args:
            layer: the prefix of the names in a sparse layer.
        """
        tensors = {name: t for name, t in self.spec.tensors.items() if not name.startswith("layers.")}
        for i in self.spec.traits.get("sparse_layers", ()):
            for part, names in self.family.names.items():
                if (found := self.spec.tensors.get(f"layers.{i}.{part}")) is None:
                    continue
                halves = [(names, found)] if isinstance(names, str) else zip(names, found.chunk(2, dim=-2), strict=True)
                tensors |= {f"{layer.format(i)}{name}": half.contiguous() for name, half in halves}
        return tensors


def match(spec: ModelSpec, family: T) -> Match[T]:
    """Express a model as a class.

    Raises:
        Unsupported: the class computes something else, with the first difference.
    """
    fields: dict[str, Any] = dict(family.settings)
    for trait, rule in family.rules.items():
        spec, written = match_trait(spec, trait, rule, fields)
        fields |= written
    return Match(family, spec, fields)


def match_trait(
    spec: ModelSpec, trait: str, rule: WriteRule, fields: Mapping[str, Any]
) -> tuple[ModelSpec, dict[str, Any]]:
    """The fields of one trait, and the model with the trait rewritten if it had to be.

    Raises:
        Unsupported: neither as it is nor by a rewrite.
    """
    if trait not in spec.traits:
        return spec, {}
    try:
        return spec, _written(spec, trait, rule, fields)
    except Unsupported as error:
        again = None if error.wanted is ... else rewritten(spec, trait, error.wanted)
        if again is None:
            raise Unsupported(f"{trait.replace('_', ' ')}: {error}", trait=trait) from None
        return again, _written(again, trait, rule, fields)


def _written(spec: ModelSpec, trait: str, rule: WriteRule, fields: Mapping[str, Any]) -> dict[str, Any]:
    written = rule.write(spec[trait], spec.traits)
    for name, value in written.items():
        if name in fields and fields[name] != value:
            raise Unsupported(f"its field {name} is {fields[name]} already, for another trait", fields[name])
    return written


def best_match(spec: ModelSpec, families: Iterable[T], program: str) -> Match[T]:
    """The match with the fewest rewrites; among equals the class that comes first.

    Args:
        spec: the model.
        families: the classes.
        program: of the classes, for the message.

    Raises:
        Unsupported: no class computes this; the reasons are those of the classes that differ in their sparse layers
            only, or of all if there is none.
    """
    found: list[Match[T]] = []
    reasons: dict[str, Unsupported] = {}
    for family in families:
        try:
            found.append(match(spec, family))
        except Unsupported as error:
            reasons[family.title] = error
    if found:
        return min(found, key=lambda each: len(each.rewrites))
    near = {t: error for t, error in reasons.items() if error.trait in EXPERTS}
    said = "; ".join(f"{title}, {error}" for title, error in (near or reasons).items())
    trait = next(iter((near or reasons).values())).trait
    raise Unsupported(f"no class of {program} computes what this model does: {said}", trait=trait)
