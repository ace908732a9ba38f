"""Measure the seconds that `import moeify` adds to `import torch`, in pairs of fresh processes.

Both ways of a round start a new interpreter; their difference is taken round by round. CPU seconds are those of the
process and do not count waiting for a disk. The first round warms the disk's cache and is left out.

    python benchmarks/startup.py
"""

from __future__ import annotations

import subprocess
import sys

import measure

IMPORTS = {"torch": "import torch", "torch and moeify": "import torch, moeify"}
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
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in IMPORTS}

    def way(name: str, turn: int) -> float:
        times[name].append(seconds(IMPORTS[name]))
        return 0.0

    measure.in_turn({name: lambda turn, name=name: way(name, turn) for name in IMPORTS}, chosen.rounds + 1)
    kept = {name: pairs[1:] for name, pairs in times.items()}
    kept["moeify adds"] = [
        (both[0] - alone[0], both[1] - alone[1]) for alone, both in zip(*(kept[name] for name in IMPORTS), strict=True)
    ]
    rows = [
        head
        | {"imports": name}
        | measure.summary(("cpu_s", "cpu_quartiles_s"), [cpu for _, cpu in pairs], ".3f")
        | measure.summary(("wall_s", "wall_quartiles_s"), [wall for wall, _ in pairs], ".3f")
        for name, pairs in kept.items()
    ]
    measure.report(chosen.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
