"""Which fields of the rows of a data file are read: its text with its domain, or named columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

CHATS = ("messages", "conversations")
"""Fields that may hold a list of messages where a row has no text."""


class NoField(ValueError):
    """A data file has rows, but not the field to read."""


class NoTextField(NoField):
    """None of the fields is the text."""


class Fields(Protocol):
    """The fields of a file's rows that are read."""

    @property
    def example(self) -> str:
        """The name of one of them, for messages."""
        ...

    def among(self, names: Iterable[str], source: object) -> list[str]:
        """The fields to read among those that rows have; raises NoField if one is missing."""
        ...


@dataclass(frozen=True)
class TextField:
    """The field that holds the text, or else messages, and the domain.

    Attributes:
        example: the name of the field.
    """

    example: str

    def among(self, names: Iterable[str], source: object) -> list[str]:
        """The field of the text, or of messages, and `domain` if it is there."""
        names = list(names)
        return [name for name in names if name in {text_field(names, source, self.example), "domain"}]


@dataclass(frozen=True)
class Columns:
    """Named columns.

    Attributes:
        needed: columns that must be there; without any, all are read.
        others: columns that may be missing.
    """

    needed: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def example(self) -> str:
        """The first of the columns."""
        return next(iter(self.needed), "column")

    def among(self, names: Iterable[str], source: object) -> list[str]:
        """The needed columns, and the others that are there."""
        names = [str(name) for name in names]
        for name in self.needed:
            if name not in names:
                raise NoField(f"{source} has no column {name!r}; it has: {', '.join(names)}")
        return [name for name in names if not self.needed or name in self.needed + self.others]


def text_field(fields: Iterable[str], source: object, field: str) -> str:
    """The field to read: the one that `field` names, or else messages."""
    names = [str(name) for name in fields]
    if (key := next((name for name in (field, *CHATS) if name in names), None)) is None:
        raise NoTextField(
            f"{source} has no field {field!r}, it has: {', '.join(names)}; rename the one to read, or name it with "
            "read_texts(..., field=...)"
        )
    return key
