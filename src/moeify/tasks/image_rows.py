"""Read the rows of labelled images: folders of classes, tables, arrays, scans of scikit-learn, or synthetic digits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from moeify.data.images import ENDINGS, image_of
from moeify.data.records import hold_out, read_class_folders
from moeify.data.synthetic import strokes
from moeify.tasks.rows import Row, read_parts

TRAIN, HELD_OUT = 4000, 500
"""Synthetic digits in either part."""


@dataclass(frozen=True)
class Images:
    """Rows with an `image`, a `label` and perhaps a `group`.

    Attributes:
        train: rows to train on.
        validation: held-out rows.
        folder: where paths of images start.
    """

    train: list[Row]
    validation: list[Row]
    folder: Path = Path()

    def image(self, row: Row) -> UInt8[Tensor, "C H W"]:
        """The decoded image of a row."""
        return image_of(row["image"], self.folder, f"an image of class {row['label']}")


def read_images(data: str | None, validation: str | None, fields: Mapping[str, str]) -> Images:
    """The images that a source holds.

    Args:
        data: a folder with a folder per class, a table, an `.npz` file, `digits` for those of scikit-learn, or None for
            synthetic ones.
        validation: a source of the same kind whose rows are all held out.
        fields: role (`image`, `label`, perhaps `group`) -> field of a table, or array of an `.npz` file.

    Raises:
        FileNotFoundError: there is no such source.
        ImportError: a library that reads it is missing.
        ValueError: it has no images, or lacks a field.
    """
    if validation is not None:
        if data is None:
            raise ValueError(f"{validation} cannot be held out from synthetic images; give data as well")
        whole, apart = (read_images(source, None, fields) for source in (data, validation))
        if whole.folder.resolve() != apart.folder.resolve():
            apart = Images([], [_absolute(row, apart.folder) for row in (*apart.train, *apart.validation)])
        return Images(whole.train + whole.validation, apart.train + apart.validation, whole.folder)
    if data is None:
        drawn = [strokes(count, seed) for seed, count in enumerate((TRAIN, HELD_OUT))]
        train, held_out = (_rows({"image": images, "label": digits}) for images, digits in drawn)
        return Images(train, held_out)
    path = Path(data)
    if data == "digits" or path.suffix == ".npz":
        rows = _rows(_scans() if data == "digits" else _arrays(path, fields))
        train, held_out = hold_out(list(enumerate(rows)), key=lambda numbered: numbered[0])
        return Images([row for _, row in train], [row for _, row in held_out])
    if path.is_dir() and any(each.is_dir() for each in path.iterdir()):
        found = read_class_folders(data, ENDINGS)
        train, held_out = ([{**row, "image": row["path"]} for row in part] for part in (found.train, found.validation))
        return Images(train, held_out, found.folder)
    train, held_out = read_parts(data, None, fields)
    return Images(train, held_out, path if path.is_dir() else path.parent)


def _absolute(row: Row, folder: Path) -> Row:
    return {**row, "image": image_of(row["image"], folder, f"an image of class {row['label']}")}


def _rows(columns: Mapping[str, Tensor]) -> list[Row]:
    """A row per image; labels and groups as whole numbers."""
    rows = []
    for values in zip(*columns.values(), strict=True):
        row: Row = dict(zip(columns, values, strict=True))
        rows.append({name: value if name == "image" else int(value) for name, value in row.items()})
    return rows


def _scans() -> dict[str, Tensor]:
    """1,797 scans of handwritten digits of 8 by 8 pixels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("the scans of digits come with scikit-learn; pip install 'moeify[adapters]'") from None
    found: Any = load_digits()
    return {"image": torch.as_tensor(found.images).float() / 16, "label": torch.as_tensor(found.target)}


def _arrays(path: Path, fields: Mapping[str, str]) -> dict[str, Tensor]:
    import numpy

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with numpy.load(path, allow_pickle=False) as file:
        if missing := [name for name in fields.values() if name not in file]:
            raise ValueError(f"{path} has no array {missing[0]!r}; it has: {', '.join(file)}")
        return {role: torch.as_tensor(file[name]) for role, name in fields.items()}
