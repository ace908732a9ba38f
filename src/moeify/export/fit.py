"""Find the class of the table that computes what a `Form` computes, exactly or by rewrites that keep the function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from moeify.export.families import EXPERTS, Names
from moeify.export.form import Form, Misfit
from moeify.export.rewrites import rewritten
from moeify.export.rules import Writes


class Target(Protocol):
    """What a model may be expressed as: a class of transformers, or an architecture of llama.cpp."""

    @property
    def title(self) -> str:
        """Its display name."""
        ...

    @property
    def rules(self) -> Mapping[str, Writes]:
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
class Fit(Generic[T]):
    """A class that computes the same function as a model, with what to write for it.

    Attributes:
        family: the class.
        form: the model, after all rewrites.
        fields: of the class's configuration.
    """

    family: T
    form: Form = field(repr=False)
    fields: Mapping[str, Any] = field(repr=False)

    @property
    def rewrites(self) -> tuple[str, ...]:
        """What was rewritten; a fit without is exact."""
        return self.form.rewrites

    def tensors(self, layer: str = "model.layers.{}.") -> dict[str, Tensor]:
        """The tensors by the names of the class.

        Args:
            layer: what the names in a sparse layer begin with.
        """
        tensors = {name: t for name, t in self.form.tensors.items() if not name.startswith("layers.")}
        for i in self.form["sparse_layers"]:
            for part, names in self.family.names.items():
                if (found := self.form.tensors.get(f"layers.{i}.{part}")) is None:
                    continue
                halves = [(names, found)] if isinstance(names, str) else zip(names, found.chunk(2, dim=-2), strict=True)
                tensors |= {f"{layer.format(i)}{name}": half.contiguous() for name, half in halves}
        return tensors


def fit(form: Form, family: T) -> Fit[T]:
    """Express a model as a class.

    Raises:
        Misfit: the class computes something else, with the first difference.
    """
    fields: dict[str, Any] = dict(family.settings)
    for trait, rule in family.rules.items():
        form, written = fit_trait(form, trait, rule, fields)
        fields |= written
    return Fit(family, form, fields)


def fit_trait(form: Form, trait: str, rule: Writes, fields: Mapping[str, Any]) -> tuple[Form, dict[str, Any]]:
    """The fields of one trait, and the model with the trait rewritten if it had to be.

    Raises:
        Misfit: there is no way.
    """
    if trait not in form.traits:
        return form, {}
    try:
        return form, _written(form, trait, rule, fields)
    except Misfit as misfit:
        again = None if misfit.wanted is ... else rewritten(form, trait, misfit.wanted)
        if again is None:
            raise Misfit(f"{trait.replace('_', ' ')}: {misfit}", trait=trait) from None
        return again, _written(again, trait, rule, fields)


def _written(form: Form, trait: str, rule: Writes, fields: Mapping[str, Any]) -> dict[str, Any]:
    written = rule.write(form[trait], form.traits)
    for name, value in written.items():
        if name in fields and fields[name] != value:
            raise Misfit(f"its field {name} says {fields[name]} for another trait too", fields[name])
    return written


def best(form: Form, families: Iterable[T], program: str) -> Fit[T]:
    """The fit with the fewest rewrites; among equals the class that comes first.

    Args:
        form: the model.
        families: the classes.
        program: of the classes, for the message.

    Raises:
        Misfit: no class computes this; the reasons are those of the classes that differ in their sparse layers only, or
            of all if there is none.
    """
    found: list[Fit[T]] = []
    reasons: dict[str, Misfit] = {}
    for family in families:
        try:
            found.append(fit(form, family))
        except Misfit as misfit:
            reasons[family.title] = misfit
    if found:
        return min(found, key=lambda each: len(each.rewrites))
    near = {t: misfit for t, misfit in reasons.items() if misfit.trait in EXPERTS}
    said = "; ".join(f"{title}, {misfit}" for title, misfit in (near or reasons).items())
    trait = next(iter((near or reasons).values())).trait
    raise Misfit(f"no class of {program} computes what this model does: {said}", trait=trait)
