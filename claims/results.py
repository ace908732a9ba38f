"""Where results of claims are kept: one tracked CSV per claim, a row per run, with what it ran on."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from moeify import env

RESULTS = env.CLAIM_RESULTS.path or Path(__file__).parent / "results"


def append(claim: str, values: dict[str, Any]) -> None:
    """Add a row to a claim's file; a column that it did not have yet is empty in the rows before.

    Raises:
        ValueError: the row lacks a column of the file.
    """
    row = {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    } | values
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{claim}.csv"
    columns = _columns(file, row)
    with file.open("a", newline="") as out:
        csv.DictWriter(out, columns).writerow(row)


def _columns(file: Path, row: dict[str, Any]) -> list[str]:
    """The columns of a file, after those that it lacks have been added."""
    there, rows = [], []
    if file.exists():
        with file.open(newline="") as lines:
            reader = csv.DictReader(lines)
            there, rows = list(reader.fieldnames or ()), list(reader)
    if missing := [column for column in there if column not in row]:
        raise ValueError(f"{file} has the columns {', '.join(missing)}, and the new row does not")
    columns = there + [column for column in row if column not in there]
    if columns != there:
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
    return columns


def _commit() -> str:
    """Of the checkout that this file is in; `unknown` in a copy without its history."""
    try:
        said = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except FileNotFoundError:
        return "unknown"
    return said.stdout.strip() or "unknown"
