"""Set the number of threads of a command and how idle ones wait, before torch is loaded, and describe both in a line.

OpenMP takes as many threads as the machine has, and idle ones spin. Where another process uses one of the cores, or a
container may use fewer cores than it sees, spinning threads occupy the cores of the threads that they wait for. Where
they sleep at once, every short operation waits until they are awake: on an idle machine two are then slower than one.
So they spin for a few microseconds, where the runtime is that of GCC, as in torch for Linux, and sleep elsewhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path

COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables of the number of threads; the first one is set where none is."""

WAITS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables of how idle threads wait; `WAITING` is set where none is."""

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""How idle threads wait; GCC's runtime reads its own variable first."""

Environment = MutableMapping[str, str]


def prepare(environment: Environment = os.environ) -> None:
    """Set the number of threads and how idle ones wait, unless the user did or torch is loaded already."""
    if "torch" in sys.modules:
        return
    if not any(environment.get(name) for name in COUNTS):
        environment[COUNTS[0]] = str(usable_cores())
    if not any(environment.get(name) for name in WAITS):
        environment.update(WAITING)


def describe(environment: Environment = os.environ) -> str:
    """One line: the cores that this process may use, and the variables that say how they are used."""
    said = [f"{name}={environment[name]}" for name in (*COUNTS, *WAITS) if environment.get(name)]
    limit = "" if (quota := cpu_quota()) is None else f", a container's quota of {quota:g}"
    return f"threads: {len(_allowed())} processors{limit}; {', '.join(said) or 'OpenMP decides'}"


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may use: of its affinity, one for each physical core, and no more than its quota."""
    siblings = {_siblings(root, processor) for processor in _allowed()}
    quota = cpu_quota(root)
    return max(1, len(siblings) if quota is None else min(len(siblings), int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processors that the control group of this process may use, in the tightest of its parents; None for all."""
    return min(_quotas(root), default=None)


def _allowed() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _siblings(root: Path, processor: int) -> str:
    """The threads of the core that a processor belongs to, as Linux writes them; the processor alone elsewhere."""
    file = root / f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
    return _read(file) or str(processor)


def _quotas(root: Path) -> Iterator[float]:
    groups = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            for folder in _upwards(groups, path):
                limit, _, period = _read(folder / "cpu.max").partition(" ")
                if limit.isdigit() and period.isdigit():
                    yield int(limit) / int(period)
        elif "cpu" in controllers.split(","):
            for folder in _upwards(groups / "cpu", path):
                limit, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
                if limit.isdigit() and period.isdigit():  # -1 where there is none
                    yield int(limit) / int(period)


def _upwards(root: Path, path: str) -> list[Path]:
    """A group's folder and those of its parents; inside a container, only the root may be there."""
    parts = [part for part in path.split("/") if part and part != ".."]
    return [root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
