"""CPU time of what is compared, measured by turns, so that noise slows all of it alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


def by_turns(work: Mapping[Name, Callable[[], object]], rounds: int = 3) -> dict[Name, float]:
    """The median CPU time of each, in seconds, of so many rounds after one that does not count."""
    taken: dict[Name, list[float]] = {name: [] for name in work}
    for turn in range(rounds + 1):
        for name, run in work.items():
            began = time.process_time()
            run()
            if turn:
                taken[name].append(time.process_time() - began)
    return {name: median(values) for name, values in taken.items()}
