"""What else a machine did while something was measured on it, and how its processor was set."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

BUSY = 0.1
"""Cores that other processes may use before a row counts as measured on a loaded machine."""
PROC = Path("/proc")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


class Others:
    """How many cores others use: every other process here, and other virtual machines on the same processor.

    The process group of the program is not an other, so a program may start workers.
    """

    def __init__(self) -> None:
        self._begun = self._now()

    def cores(self) -> str:
        """Cores used since the last call, or since it was made, with a mark if these are too many; '' if unknown."""
        begun, self._begun = self._begun, self._now()
        if begun is None or self._begun is None:
            return ""
        elapsed, busy = (after - before for after, before in zip(self._begun, begun, strict=True))
        cores = max(0.0, busy / elapsed)
        return f"{cores:.2f}" + (" busy" if cores > BUSY else "")

    @staticmethod
    def _now() -> tuple[float, float] | None:
        """Seconds on the clock, and seconds that the cores were busy for others; None without Linux's /proc."""
        try:
            user, nice, system, _, _, irq, softirq, steal = map(int, (PROC / "stat").read_text().split()[1:9])
        except OSError:
            return None
        ticks = user + nice + system + irq + softirq + steal - _ticks_of_group(os.getpgrp())
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK")


def _ticks_of_group(group: int) -> int:
    """Ticks that the live processes of a group and their ended children took."""
    total = 0
    for stat in PROC.glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[2]) == group:
            total += sum(map(int, fields[11:15]))
    return total


def processor() -> dict[str, str]:
    """The vector instructions that torch uses, the governor of the clock, and the load average of the last minute."""
    governor = GOVERNOR.read_text().strip() if GOVERNOR.exists() else ""
    load = f"{os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    return {"isa": torch.backends.cpu.get_cpu_capability(), "governor": governor, "load_average": load}
