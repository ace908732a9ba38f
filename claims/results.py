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
    """Add a row to a claim's file.

    Raises:
        ValueError: the file has other columns.
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
    columns = list(row)
    if file.exists():
        with file.open(newline="") as lines:
            columns = next(csv.reader(lines))
        if columns != list(row):
            raise ValueError(f"{file} has the columns {columns}, the new row has {list(row)}")
    is_new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, columns)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def _commit() -> str:
    """Of the checkout that this file is in; `unknown` in a copy without its history."""
    try:
        said = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except FileNotFoundError:
        return "unknown"
    return said.stdout.strip() or "unknown"
