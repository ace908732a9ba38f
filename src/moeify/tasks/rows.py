"""Read the rows of a task's data: named fields, also nested ones, and held-out rows from the data or another file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moeify.data.fields import Columns, NoField
from moeify.data.records import read_records
from moeify.data.rows import chat

Row = dict[str, Any]


def read_parts(
    data: str, validation: str | None, needed: Mapping[str, str], others: Mapping[str, str] | None = None
) -> tuple[list[Row], list[Row]]:
    """The rows to train on and those held out, with their fields by role.

    Args:
        data: a file, folder or hub data set with rows.
        validation: another one whose rows are all held out; None for those that `data` holds out.
        needed: role -> field; `a.b` is the field b inside a.
        others: role -> field that may be missing; the role is then not in the row.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: rows that cannot be read, or that lack a field; the message names file and row.
    """
    others = others or {}
    read = read_records(data, Columns(_columns(needed), _columns(others)), validation=validation)
    held_out = f"{validation or data}, held-out row"
    return (
        [_by_role(row, needed, others, f"{data}, training row {n}") for n, row in enumerate(read.train, 1)],
        [_by_role(row, needed, others, f"{held_out} {n}") for n, row in enumerate(read.validation, 1)],
    )


def _columns(fields: Mapping[str, str]) -> tuple[str, ...]:
    """The columns that fields are in."""
    return tuple(dict.fromkeys(field.split(".")[0] for field in fields.values()))


def _by_role(row: Row, needed: Mapping[str, str], others: Mapping[str, str], where: str) -> Row:
    found = {role: _inside(row, field, where) for role, field in needed.items()}
    return found | {role: _inside(row, field, where) for role, field in others.items() if field.split(".")[0] in row}


def _inside(row: Mapping[str, Any], field: str, where: str) -> Any:
    value: Any = row
    for name in field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            has = ", ".join(map(str, value)) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise NoField(f"{where} has no field {field!r}; at {name!r} it has {has}")
        value = value[name]
    return value


def value_of(text: Any, where: str) -> str:
    """A text, or the messages of a chat joined into one."""
    return text if isinstance(text, str) else chat(text, where)
