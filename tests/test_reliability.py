"""Every promise of docs/reliability.md names tests, and they exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def functions(file: str) -> set[str]:
    path = ROOT / file
    return {part.name for part in ast.parse(path.read_text("utf-8")).body if isinstance(part, ast.FunctionDef)}


def test_every_named_test_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 50
    assert not [f"{file}::{name}" for file, name in named if name not in functions(file)]


def test_every_promise_names_a_test():
    rows = re.findall(r"^\| (?!promise|-)(.*?) \|(.*?)\|", PAGE, re.MULTILINE)
    assert len(rows) > 30
    assert not [promise for promise, held_by in rows if "`tests/" not in held_by]
