"""Measure the seconds that `import moeify` adds to `import torch`, and those of `moeify --help`, in fresh processes.

Every way of a round starts a new interpreter; the difference of two is taken round by round. CPU seconds are those of
the process and do not count waiting for a disk. All run once before, to warm the disk's cache.

    python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import measure

HELP = """
import contextlib, io, sys
sys.argv = ["moeify", "--help"]
from moeify.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main()
"""
PAIR = ("torch", "torch and moeify")
WAYS = dict(zip(PAIR, ("import torch", "import torch, moeify"), strict=True)) | {"moeify --help": HELP}
COLUMNS = [*measure.HEAD, "imports", "cpu_s", "cpu_quartiles_s", "wall_s", "wall_quartiles_s"]
CLOCK = "import time; wall, cpu = time.perf_counter(), time.process_time()"
READ = "print(time.perf_counter() - wall, time.process_time() - cpu)"


def seconds(statement: str) -> tuple[float, float]:
    """Wall and CPU seconds of a statement in a fresh interpreter."""
    program = "\n".join([CLOCK, statement, READ])
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    wall, cpu = map(float, run.stdout.split())
    return wall, cpu


def main() -> None:
    chosen = measure.parser(__doc__, rounds=15, file="startup-cpu.csv").parse_args()
    head = measure.start(chosen)
    for _ in measure.points(chosen, head, [{}]):
        compare(chosen, head)


def compare(chosen: argparse.Namespace, head: dict[str, str]) -> None:
    """Both ways in turn, and the difference."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}

    def way(name: str, turn: int) -> float:
        times[name].append(seconds(WAYS[name]))
        return 0.0

    for statement in WAYS.values():
        seconds(statement)
    measure.in_turn({name: lambda turn, name=name: way(name, turn) for name in WAYS}, chosen.rounds)
    times["moeify adds"] = [
        (both[0] - alone[0], both[1] - alone[1]) for alone, both in zip(*(times[name] for name in PAIR), strict=True)
    ]
    rows = [
        head
        | {"imports": name}
        | measure.summary(("cpu_s", "cpu_quartiles_s"), [cpu for _, cpu in pairs], ".3f")
        | measure.summary(("wall_s", "wall_quartiles_s"), [wall for wall, _ in pairs], ".3f")
        for name, pairs in times.items()
    ]
    measure.report(chosen.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
