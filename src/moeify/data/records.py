"""Rows of a file or folder by column, such as paths with labels, split into training and held-out rows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeify.data.fields import Columns
from moeify.data.hub import named_splits, plain_rows
from moeify.data.rows import is_data, read_table
from moeify.data.text import PARTS

Row = dict[str, Any]

PARTS_READ = ("train", "validation")


@dataclass(frozen=True)
class Records:
    """Rows to train on and held-out rows.

    Attributes:
        train: rows by column.
        validation: rows by column.
        folder: the folder that paths in the rows start from.
    """

    train: list[Row]
    validation: list[Row]
    folder: Path


def read_records(
    source: str | Path, columns: Columns, *, validation: str | Path | None = None, key: Callable[[Row], object] = repr
) -> Records:
    """Read a table, a folder of tables, or a data set of the library datasets.

    A folder has a table named `train*` and, if there is one, one named `validation*` or like it; or is what
    `save_to_disk` of the library datasets wrote. A data set of the hub is `org/name` or `org/name:config`. Tables are
    JSON, CSV or parquet, see `moeify.data.rows`. A table or split named `test*` is never read. Where nothing is held
    out, a tenth of the keys is.

    Args:
        source: a file, a folder, or a name.
        columns: what to read.
        validation: another source, whose rows are all held out; those of `source` are then all to train on.
        key: rows with equal keys are in the same part.

    Raises:
        FileNotFoundError: there is no such source.
        ImportError: a data set without the library that reads it.
        ValueError: a folder without a table to train on; a table that is empty, or that cannot be read.
    """
    train, held_out = _parts(source, columns)
    if validation is not None:
        train, held_out = [*train, *held_out], [row for part in _parts(validation, columns) for row in part]
    elif not held_out:
        train, held_out = hold_out(train, key)
    path = Path(source)
    return Records(train, held_out, path if path.is_dir() else path.parent)


def _parts(source: str | Path, columns: Columns) -> tuple[list[Row], list[Row]]:
    """The rows to train on, at least one, and those that the source holds out."""
    path = Path(source)
    if (splits := named_splits(source)) is not None:
        train, held_out = _of_splits(splits, columns, source)
    else:
        parts = _tables(path) if path.is_dir() else {"train": [path], "validation": []}
        train, held_out = ([row for each in parts[part] for row in read_table(each, columns)] for part in PARTS_READ)
    if not train:
        raise ValueError(f"{source} is empty: there is no row to train on")
    return train, held_out


def _of_splits(splits: Mapping[str, Any], columns: Columns, source: object) -> tuple[list[Row], list[Row]]:
    found: dict[str, list[Row]] = {part: [] for part in PARTS_READ}
    for split, rows in splits.items():
        if (part := PARTS.get(split)) is not None:
            for row in plain_rows(rows):
                found[part].append({name: row[name] for name in columns.among(row, f"{source}, {split}")})
    return found["train"], found["validation"]


def read_class_folders(source: str | Path, endings: Sequence[str]) -> Records:
    """List the files of a folder that has a folder per class, as rows of `path` and `label`.

    The folders `train` and `validation` (or `valid`, `val`, `dev`) may be above those of the classes; a folder `test`
    beside them is never read. Where nothing is held out, a tenth of the files is.

    Args:
        source: the folder.
        endings: of the files that are listed, in lower case: `(".wav",)`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it has no such file in a folder of a class.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {source}")
    tops = {PARTS.get(path.name.lower()): path for path in folder.iterdir() if path.is_dir()}
    has_parts = "train" in tops and any(path.is_dir() for path in tops["train"].iterdir())
    parts = {part: tops[part] for part in PARTS_READ if part in tops} if has_parts else {"train": folder}
    rows = {
        part: [
            {"path": path.relative_to(folder).as_posix(), "label": path.relative_to(top).parts[0]}
            for path in sorted(top.glob("*/**/*"))
            if path.suffix.lower() in endings and path.is_file()
        ]
        for part, top in parts.items()
    }
    if not rows["train"]:
        raise ValueError(f"{source} has no {' or '.join(endings)} file in a folder of a class: CLASS/NAME{endings[0]}")
    if not rows.get("validation"):
        rows = dict(zip(PARTS_READ, hold_out(rows["train"]), strict=True))
    return Records(rows["train"], rows["validation"], folder)


def _tables(folder: Path) -> dict[str, list[Path]]:
    """The tables of a folder by part; one that is alone is the training part."""
    tables = [path for path in sorted(folder.iterdir()) if path.is_file() and is_data(path)]
    named = {part: [path for path in tables if _part(path) == part] for part in PARTS_READ}
    if not named["train"] and len(tables) == 1:
        return {"train": tables, "validation": []}
    if not named["train"]:
        found = ", ".join(path.name for path in tables) or "no table"
        raise ValueError(f"{folder} has no table named train*; it has {found}; name one of its files")
    return named


def _part(path: Path) -> str | None:
    return PARTS.get(re.split(r"[-_.]", path.name.lower())[0])


def hold_out(rows: Sequence[Any], key: Callable[[Any], object] = repr) -> tuple[list[Any], list[Any]]:
    """Split rows into nine tenths and one tenth of their keys, those with the smallest hashes, at least one.

    Raises:
        ValueError: fewer than two keys.
    """
    hashes = {value: hashlib.sha256(repr(value).encode(errors="replace")).digest() for value in map(key, rows)}
    if len(hashes) < 2:
        raise ValueError(f"{len(rows)} rows with {len(hashes)} different keys cannot be split; give more rows")
    chosen = set(sorted(hashes, key=hashes.__getitem__)[: max(1, len(hashes) // 10)])
    return [row for row in rows if key(row) not in chosen], [row for row in rows if key(row) in chosen]


def inside(folder: Path, name: str) -> Path:
    """The path of a file that a row names, which must lie in the folder.

    Raises:
        ValueError: it is outside of the folder.
    """
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} is not inside {folder}; move the file there, and name it by its path in the folder")
    return path
