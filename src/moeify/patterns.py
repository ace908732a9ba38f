"""Regular expressions from files, with a time limit, since a match can take exponential time."""

from __future__ import annotations

import functools
from typing import Any

LONGEST = 1.0
"""Seconds that one match may take; ordinary patterns take microseconds."""


def search(pattern: str, name: str) -> bool:
    """Whether a pattern matches somewhere in a name, as `re.search` decides.

    Raises:
        ValueError: not a regular expression, or a match takes longer than `LONGEST`.
    """
    compiled = _compiled(pattern)
    try:
        return compiled.search(name, timeout=LONGEST) is not None
    except TimeoutError:
        raise ValueError(
            f"the regular expression {pattern!r} takes longer than {LONGEST:g} s on {name!r}; write it without "
            "repetitions inside repetitions"
        ) from None


@functools.cache
def _compiled(pattern: str) -> Any:
    import regex

    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, TypeError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
