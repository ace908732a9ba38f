"""Tests that `make nightly` runs, and `make test` leaves out for their time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from moeify.catalogue import catalogue


def nightly(*values: Any) -> Any:
    """A case that only `make nightly` runs."""
    return pytest.param(*values, marks=pytest.mark.nightly)


def one_of_each(names: Iterable[str]) -> list[Any]:
    """Names of recipes, of which those that are settings of one router run at night."""
    return [nightly(name) if name in layouts() else name for name in names]


def layouts() -> list[str]:
    """The recipes that are settings of one router, each compared with its family's block in test_family_recipes."""
    return [name for name, entry in catalogue().items() if entry.page == "families"]
