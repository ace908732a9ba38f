"""Read the rows of a CSV file of numbers fast, and name the line of a row that is damaged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def parse_rows(
    lines: Sequence[str], columns: Sequence[str], where: str, *, first_line: int = 1, fraction: str | None = None
) -> dict[str, Tensor]:
    """The columns of rows of whole numbers from 0 on, int64; `fraction` is one of any numbers, float32.

    Args:
        lines: the rows.
        columns: their names.
        where: the name of the file.
        first_line: the number of the first row's line.
        fraction: the name of the column of other numbers.

    Raises:
        ValueError: no row, or a damaged one.
    """
    if not lines:
        raise ValueError(f"{where} has no row")
    is_whole = np.array([name != fraction for name in columns])
    try:
        table = np.loadtxt(lines, delimiter=",", comments=None, ndmin=2)
    except ValueError:
        table = np.empty((0, 0))
    if table.shape != (len(lines), len(columns)) or not _right(table, is_whole).all():
        for number, line in enumerate(lines, first_line):
            _check(line, f"{where}, line {number}", is_whole)
    numbers = torch.from_numpy(table)
    return {name: numbers[:, i].float() if name == fraction else numbers[:, i].long() for i, name in enumerate(columns)}


def _right(table: np.ndarray, is_whole: np.ndarray) -> np.ndarray:
    """Which rows have valid numbers."""
    whole = table[:, is_whole]
    return np.isfinite(table).all(1) & ((np.floor(whole) == whole) & (whole >= 0) & (whole < 2**31)).all(1)


def _check(line: str, where: str, is_whole: np.ndarray) -> None:
    cells = line.split(",")
    if len(cells) != len(is_whole):
        raise ValueError(f"{where}: {len(cells)} values for {len(is_whole)} columns")
    try:
        row = np.array([[float(cell) for cell in cells]])
    except ValueError:
        raise ValueError(f"{where}: {line[:80]!r} has a value that is not a number") from None
    if not _right(row, is_whole).all():
        raise ValueError(f"{where}: {line[:80]!r} has a number out of range")
