"""Print what a user should know of a run that goes on."""

from __future__ import annotations


def say(text: str) -> None:
    """Print a line; an output that takes none, a full disk or a closed pipe, ends no run."""
    try:
        print(text, flush=True)
    except OSError:
        return
