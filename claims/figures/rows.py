"""Figures with their sources: computed from rows of a CSV file, or quoted from a text."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import Literal

from figures.texts import ROOT, numbers_of

T_95_OF_3, T_95_OF_5, T_95_OF_10 = 4.303, 2.776, 2.262
"""The 97.5 % quantiles of Student's t for three, five and ten seeds."""
Better = Literal["lower", "higher", ""]
LOG = "docs/log.md"
HARDWARE = {
    "claims/results/balance.csv": "AMD EPYC (Zen 4), 2 cores",
    "claims/results/branch_train_mix.csv": "AMD EPYC (Zen 4), 2 cores",
    "claims/results/branch_train_mix_4000.csv": "AMD EPYC (Zen 5), 2 cores",
    "claims/results/independent.csv": "a CPU, not noted further",
    "claims/results/mocle.csv": "AMD EPYC (Zen 4), 2 cores",
    "claims/results/mocle_layers_1.csv": "AMD EPYC (Zen 5), 2 cores",
    "claims/results/phatgoose.csv": "AMD EPYC (Zen 4), 2 cores",
    "claims/results/phatgoose_400.csv": "AMD EPYC (Zen 5), 2 cores",
    "claims/results/upcycling.csv": "AMD EPYC (Zen 4), 2 cores",
}
"""Of tables without such a column, from docs/log.md."""


@dataclass(frozen=True)
class Figure:
    """A value and how anybody can find it again.

    Attributes:
        value: as the source has it, not rounded.
        source: path from the root of the repository.
        rows: which rows, or the words that are quoted.
        take: the column, and what is done with it.
        better: which side flatters moeify; figures are rounded to the other one. Nothing if neither does.
        facts: date, commit, hardware and seeds of the rows.
    """

    value: float
    source: str
    rows: str
    take: str
    better: Better
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Rows:
    """Some rows of a CSV file."""

    file: str
    rows: tuple[dict[str, str], ...]
    key: str = ""

    def where(self, **equal: str | int) -> Rows:
        """The rows whose columns have these values.

        Raises:
            ValueError: there are none.
        """
        wanted = {column: str(value) for column, value in equal.items()}
        found = tuple(row for row in self.rows if wanted.items() <= row.items())
        if not found:
            raise ValueError(f"{self.file} has no row with {wanted}")
        return Rows(self.file, found, ", ".join(filter(None, [self.key, *(f"{c}={v}" for c, v in wanted.items())])))

    def last(self, *columns: str) -> Rows:
        """The last row of every combination of these columns, as a later run replaces an earlier one."""
        newest = {tuple(row[column] for column in columns): row for row in self.rows}
        return Rows(self.file, tuple(newest.values()), f"{self.key}; the last by {', '.join(columns)}".lstrip("; "))

    def values(self, column: str) -> list[float]:
        return [float(row[column]) for row in self.rows if row[column]]

    def figure(self, value: float, take: str, better: Better = "") -> Figure:
        """A figure that was computed of these rows; `take` says of what and how."""
        return Figure(value, self.file, self.key or "all", take, better, _facts(self.file, self.rows))

    def one(self, column: str, better: Better = "", scale: float = 1.0) -> Figure:
        """The value of the only row.

        Raises:
            ValueError: there are several.
        """
        if len(self.rows) != 1:
            raise ValueError(f"{self.file} has {len(self.rows)} rows with {self.key}, and one was expected")
        return self.figure(scale * self.values(column)[0], column, better)

    def over(self, how: Callable[[list[float]], float], column: str, better: Better = "", scale: float = 1.0) -> Figure:
        """A function of all values of a column, such as `min`, `max` or `fmean`."""
        return self.figure(scale * how(self.values(column)), f"{how.__name__} of {column}", better)

    def minus(self, other: Rows, column: str, by: str = "seed") -> Differences:
        """Differences to other rows, paired by seed; of several runs of a seed the last counts.

        Raises:
            ValueError: a seed has no partner.
        """
        newest = (tuple({row[by]: row for row in side.rows}.values()) for side in (self, other))
        one, two = (Rows(side.file, rows, side.key) for side, rows in zip((self, other), newest, strict=True))
        ours, theirs = ({row[by]: float(row[column]) for row in side.rows} for side in (one, two))
        if ours.keys() != theirs.keys():
            raise ValueError(f"{self.file}: {self.key} and {other.key} cannot be paired by {by}")
        both = Rows(self.file, one.rows + two.rows, f"{self.key} less {other.key}")
        return Differences(both, tuple(ours[seed] - theirs[seed] for seed in ours), f"{column} paired by {by}")


@dataclass(frozen=True)
class Differences:
    """Paired differences of two arms."""

    rows: Rows
    values: tuple[float, ...]
    take: str

    def mean(self, better: Better = "") -> Figure:
        return self.rows.figure(fmean(self.values), f"mean of {self.take}", better)

    def spread(self) -> Figure:
        return self.rows.figure(stdev(self.values), f"standard deviation of {self.take}", "lower")

    def behind(self) -> Figure:
        """The mean where the text says in words which arm is ahead, without a sign."""
        return self.rows.figure(abs(fmean(self.values)), f"size of the mean of {self.take}")

    def half(self, quantile: float = T_95_OF_3) -> Figure:
        """Half the 95 % interval: the smallest difference that these seeds could tell from none."""
        half = quantile * stdev(self.values) / len(self.values) ** 0.5
        return self.rows.figure(half, f"half the 95 % interval of {self.take}", "lower")

    def ends(self, quantile: float = T_95_OF_3) -> list[Figure]:
        """Both ends of the interval that this quantile of Student's t gives."""
        half = quantile * stdev(self.values) / len(self.values) ** 0.5
        mean = fmean(self.values)
        return [self.rows.figure(mean + side * half, f"95 % interval of {self.take}") for side in (-1, 1)]


@cache
def table(file: str) -> Rows:
    """All rows of a CSV file of the repository."""
    with (ROOT / file).open(newline="", encoding="utf-8") as lines:
        return Rows(file, tuple(csv.DictReader(lines)))


def quoted(file: str, quote: str, hardware: str, only: Sequence[int] | None = None, date: str = "") -> list[Figure]:
    """The numbers in the words of a text, all or some; for what was measured and noted, and has no table.

    Args:
        file: with the words.
        quote: the words.
        hardware: that they were measured on.
        only: which of the numbers, all by default.
        date: of the measurement, by default that of the heading above the words.

    Raises:
        ValueError: the text does not have these words.
    """
    text = (ROOT / file).read_text(encoding="utf-8")
    words = re.search(r"\s+".join(map(re.escape, quote.split())), text)
    if words is None:
        raise ValueError(f"{file} does not have the words: {quote}")
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d)", text[: words.start()], re.MULTILINE)
    facts = {"date": date or (dates[-1] if dates else ""), "hardware": hardware}
    numbers = [number.value for number in numbers_of(quote)]
    chosen = numbers if only is None else [numbers[i] for i in only]
    kept = tuple((name, value) for name, value in facts.items() if value)
    return [Figure(value, file, quote, "quoted", "", kept) for value in chosen]


def _facts(file: str, rows: Sequence[dict[str, str]]) -> tuple[tuple[str, str], ...]:
    columns = {"date": "date", "commit": "commit", "hardware": "hardware", "device": "hardware", "seed": "seeds"}
    found = {"hardware": HARDWARE[file]} if file in HARDWARE else {}
    for column, name in columns.items():
        values = dict.fromkeys(row[column] for row in rows if row.get(column))
        if values:
            found[name] = ", ".join(values) if len(values) <= 4 else f"{len(values)} of them"
    first = dict.fromkeys(f"{row['first_seed']} and on, {row['seeds']}" for row in rows if row.get("first_seed"))
    if first:
        found["seeds"] = ", ".join(first)
    return tuple(found.items())
