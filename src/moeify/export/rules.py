"""Rules: how the configuration of a class stores one trait of a `ModelSpec`; the same object reads and writes it.

A rule names its fields, `read`s the trait from a configuration, and `write`s a trait as fields or raises `Unsupported`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from moeify.export.model_spec import Unsupported

Traits = Mapping[str, Any]


class WriteRule(Protocol):
    """A rule that writes a trait."""

    def write(self, value: Any, traits: Traits) -> dict[str, Any]:
        """The fields that express a value of the trait.

        Raises:
            Unsupported: the class cannot express it.
        """
        ...


class Rule(WriteRule, Protocol):
    """How the configuration of a class stores a trait: the rule also reads it."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of the configuration that store the trait."""
        ...

    def read(self, config: Any) -> Any:
        """The trait of a model with this configuration."""
        ...


@dataclass(frozen=True)
class Always:
    """The class supports a single value of the trait."""

    value: Any
    fields: tuple[str, ...] = ()

    def read(self, config: Any) -> Any:
        """The value."""
        return self.value

    def write(self, value: Any, traits: Traits) -> dict[str, Any]:
        """No field, if the model has the same value."""
        if value != self.value:
            raise Unsupported(f"always {self.value}, in the model {value}", self.value)
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
        """The value of the field."""
        return getattr(config, self.name, None)

    def write(self, value: Any, traits: Traits) -> dict[str, Any]:
        """The value under its name."""
        return {self.name: value}
