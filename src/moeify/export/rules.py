"""Rules: how the configuration of a class stores one trait of a `Form`; the same object reads and writes it.

A rule names its fields, `read`s the trait from a configuration, and `write`s a trait as fields or raises `Misfit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from moeify.export.form import Misfit

Traits = Mapping[str, Any]


class Writes(Protocol):
    """How a trait is written."""

    def write(self, value: Any, traits: Traits) -> dict[str, Any]:
        """The fields that express a value of the trait.

        Raises:
            Misfit: the class cannot express it.
        """
        ...


class Rule(Writes, Protocol):
    """How the configuration of a class stores a trait: the rule also reads it."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the configuration that store the trait."""
        ...

    def read(self, config: Any) -> Any:
        """The trait of a model with this configuration."""
        ...


@dataclass(frozen=True)
class Is:
    """The class always does this."""

    value: Any
    fields: tuple[str, ...] = ()

    def read(self, config: Any) -> Any:
        """The value."""
        return self.value

    def write(self, value: Any, traits: Traits) -> dict[str, Any]:
        """Nothing, where the model does the same."""
        if value != self.value:
            raise Misfit(f"it has {_said(self.value)}, the model {_said(value)}", self.value)
        return {}


@dataclass(frozen=True)
class Field:
    """A field holds the trait as it is."""

    name: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The field."""
        return (self.name,)

    def read(self, config: Any) -> Any:
        """Its value."""
        return getattr(config, self.name, None)

    def write(self, value: Any, traits: Traits) -> dict[str, Any]:
        """The value under its name."""
        return {self.name: value}


def _said(value: Any) -> str:
    return {None: "none", True: "one", False: "none"}.get(value, str(value)) if not isinstance(value, dict) else "one"
