"""Find the class of the table that computes what a `Form` computes, exactly or by rewrites that lose nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from moeify.export.families import EXPERTS, SPARSE, Family
from moeify.export.form import Form, Misfit
from moeify.export.rewrites import rewritten
from moeify.export.rules import Rule


@dataclass(frozen=True)
class Fit:
    """A class that can hold a model.

    Attributes:
        family: the class.
        form: the model, after what had to be rewritten.
        fields: its configuration.
    """

    family: Family
    form: Form = field(repr=False)
    fields: Mapping[str, Any] = field(repr=False)

    @property
    def rewrites(self) -> tuple[str, ...]:
        """What was rewritten; a fit without is exact."""
        return self.form.rewrites

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names of the class."""
        tensors = {name: t for name, t in self.form.tensors.items() if not name.startswith("layers.")}
        for i in self.form["sparse_layers"]:
            for part, names in self.family.names.items():
                if (found := self.form.tensors.get(f"layers.{i}.{part}")) is None:
                    continue
                halves = [(names, found)] if isinstance(names, str) else zip(names, found.chunk(2), strict=True)
                tensors |= {f"model.layers.{i}.{name}": half.contiguous() for name, half in halves}
        return tensors


def fit(form: Form, family: Family) -> Fit:
    """Express a model as a class.

    Raises:
        Misfit: the class computes something else, with the first difference.
    """
    fields: dict[str, Any] = dict(family.settings)
    for trait, rule in family.rules.items():
        form, written = fit_trait(form, trait, rule, fields)
        fields |= written
    return Fit(family, form, fields)


def fit_trait(form: Form, trait: str, rule: Rule, fields: Mapping[str, Any]) -> tuple[Form, dict[str, Any]]:
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


def _written(form: Form, trait: str, rule: Rule, fields: Mapping[str, Any]) -> dict[str, Any]:
    written = rule.write(form[trait], form.traits)
    for name, value in written.items():
        if name in fields and fields[name] != value:
            raise Misfit(f"its field {name} says {fields[name]} for another trait too", fields[name])
    return written


def best(form: Form) -> Fit:
    """The fit with the fewest rewrites; among equals the class that comes first.

    Raises:
        Misfit: no class computes this; the reasons are those of the classes that differ in their sparse layers only, or
            of all if there is none.
    """
    found: list[Fit] = []
    reasons: dict[str, Misfit] = {}
    for family in SPARSE.values():
        try:
            found.append(fit(form, family))
        except Misfit as misfit:
            reasons[family.title] = misfit
    if found:
        return min(found, key=lambda each: len(each.rewrites))
    near = {t: misfit for t, misfit in reasons.items() if misfit.trait in EXPERTS}
    said = "; ".join(f"{title}, {misfit}" for title, misfit in (near or reasons).items())
    raise Misfit(f"no class of transformers computes what this model does: {said}")
