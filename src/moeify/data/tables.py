"""Tables as inputs of a model: columns of numbers and of categories, and one 0/1 label per task, missing values or not.

schema = Schema.of(rows, ["income", "marital_status=Never-married"], leave_out=["relationship"])
samples = schema.encode(rows)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

Row = Mapping[str, Any]

MISSING = ("", "?", "na", "n/a", "nan", "none", "null")
"""How tables write a missing value, in lower or upper case."""

POSITIVE = ("1", "1.0", "true", "yes")
"""Values of a column of two that are the positive ones, in lower or upper case."""

CATEGORIES = 1000
"""Values of a column, the most frequent ones, that are told apart; all others are one category."""


@dataclass(frozen=True)
class Target:
    """A column to predict, as whether it has a certain value.

    Attributes:
        column: its name.
        value: the value that is the label 1.
    """

    column: str
    value: str

    @property
    def name(self) -> str:
        """The task in words: `income=>50K`."""
        return f"{self.column}={self.value}"

    @classmethod
    def of(cls, written: str, rows: Sequence[Row]) -> Target:
        """The target that is written `column`, for a column of two values, or `column=value`.

        Of two values the positive one is 1, true or yes, else the rarer.

        Raises:
            ValueError: no such column or value, or a column of one value, or of more without one that is named.
        """
        column, named, value = written.partition("=")
        if column not in rows[0]:
            raise ValueError(f"the table has no column {column!r} to predict; it has: {', '.join(rows[0])}")
        values = Counter(text for row in rows if (text := _text(row[column])))
        if named and value in values and len(values) > 1:
            return cls(column, value)
        if not named and len(values) == 2:
            positive = [each for each in values if each.lower() in POSITIVE]
            return cls(
                column, positive[0] if len(positive) == 1 else min(values, key=lambda each: (values[each], each))
            )
        shown = ", ".join(sorted(values)[:5]) + (", ..." if len(values) > 5 else "")
        raise ValueError(
            f"{written!r} is not a task: the column {column} has {len(values)} values ({shown}), and a task is a "
            f"column of two, or one of the values of a column: {column}={next(iter(sorted(values)), 'VALUE')}"
        )


@dataclass(frozen=True)
class Schema:
    """How the columns of a table become inputs, as its training rows define it.

    Attributes:
        categories: column -> its values, each with a number from 1; 0 stands for values that are not listed.
        numbers: column -> mean and standard deviation.
        targets: one per task.
    """

    categories: dict[str, dict[str, int]]
    numbers: dict[str, tuple[float, float]]
    targets: tuple[Target, ...]

    @classmethod
    def of(cls, rows: Sequence[Row], targets: Sequence[str], leave_out: Sequence[str] = ()) -> Schema:
        """The schema of a table: a column is one of numbers if all its values are, else one of categories.

        Columns that are predicted are no inputs. A missing value is a category of its own; among numbers it is the
        mean, and a further input marks it.

        Args:
            rows: to train on.
            targets: as of `Target.of`.
            leave_out: further columns that are no inputs.

        Raises:
            ValueError: a target or a column that is not there, no target, or no column left as an input.
        """
        if not targets:
            raise ValueError(f"no column is named to predict; name one per task, of: {', '.join(rows[0])}")
        found = tuple(Target.of(each, rows) for each in targets)
        if unknown := [name for name in leave_out if name not in rows[0]]:
            raise ValueError(f"the table has no column {unknown[0]!r} to leave out; it has: {', '.join(rows[0])}")
        inputs = [name for name in rows[0] if name not in {*leave_out, *(target.column for target in found)}]
        if not inputs:
            raise ValueError("no column is left as an input; predict or leave out fewer")
        categories, numbers = {}, {}
        for name in inputs:
            texts = [_text(row[name]) for row in rows]
            values = [number for text in texts if text and (number := _number(text)) is not None]
            if len(values) == sum(map(bool, texts)) > 0:
                numbers[name] = fmean(values), pstdev(values) or 1.0
            else:
                common = Counter(texts).most_common(CATEGORIES)
                categories[name] = {value: i for i, (value, _) in enumerate(common, 1)}
        return cls(categories, numbers, found)

    @property
    def sizes(self) -> list[int]:
        """The number of categories of each such column, with the one of values that are not listed."""
        return [len(values) + 1 for values in self.categories.values()]

    def encode(self, rows: Sequence[Row]) -> Table:
        """The rows as tensors."""
        count = len(rows)
        categories = [[known.get(_text(row[name]), 0) for row in rows] for name, known in self.categories.items()]
        numbers = torch.zeros(count, 2, len(self.numbers))
        for column, (name, (mean, deviation)) in enumerate(self.numbers.items()):
            found = [_number(_text(row[name])) for row in rows]
            numbers[:, 0, column] = torch.tensor([0.0 if v is None else (v - mean) / deviation for v in found])
            numbers[:, 1, column] = torch.tensor([float(v is None) for v in found])
        labels = [[_label(_text(row[target.column]), target) for target in self.targets] for row in rows]
        return Table(
            torch.tensor(categories, dtype=torch.int64).view(len(self.categories), count).mT.contiguous(),
            numbers.flatten(1),
            torch.tensor(labels),
        )


class Table(Dataset[dict[str, Tensor]]):
    """Encoded rows.

    Args:
        categories: the number of the category in each column of categories.
        numbers: standardised numbers, then 1 for each of them that is missing.
        labels: 0 or 1 per task, NaN where it is missing.
    """

    length = 1

    def __init__(
        self, categories: Int[Tensor, "T C"], numbers: Float[Tensor, "T M"], labels: Float[Tensor, "T G"]
    ) -> None:
        self.categories, self.numbers, self.labels = categories, numbers, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `categories` (C,), `numbers` (M,) and `labels` (G,) of a row."""
        return {
            "categories": self.categories[index],
            "numbers": self.numbers[index],
            "labels": self.labels[index],
        }

    def domain_of(self, index: int) -> str:
        """Return one name for all rows."""
        return "table"


def _text(value: object) -> str:
    """A value of a table as text, "" if it is missing."""
    text = "" if value is None else str(value).strip()
    return "" if text.lower() in MISSING else text


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _label(text: str, target: Target) -> float:
    return float(text == target.value) if text else math.nan
