"""Print messages to the user that must not end a run."""

from __future__ import annotations


def notify(text: str) -> None:
    """Print a line; a full disk or a closed pipe raises nothing."""
    try:
        print(text, flush=True)
    except OSError:
        return
