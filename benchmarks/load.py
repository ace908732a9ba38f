"""Time the training steps of `moeify train` under two ways for idle threads to wait, on an idle and on a busy machine.

The sparse model that the command makes by default is trained on its usual batch in three processes: one in which OpenMP
decides how idle threads wait, one whose waiting is set by the command line (`moeify.cli.threads`), and one of those
with a single thread. They take turns; those that wait sleep. All is measured alone, beside a process that keeps one
core busy, and beside four. Ratios are taken round by round.

    python benchmarks/load.py --threads 2
    python benchmarks/load.py --rounds 1 --steps 1 --out /tmp/load.csv
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import measure
import torch
from torch import nn

from moeify import sparsify
from moeify.cli import threads
from moeify.cli.train import Train
from moeify.data.tokenizer import ByteTokenizer
from moeify.tasks.base import Shape
from moeify.tasks.lm import small_llama

WORK = "import load; load.work()"
ONE = "command line, one thread"
PROGRAMS = {"OpenMP": WORK, "command line": f"from moeify.cli import threads; threads.prepare(); {WORK}"}
COLUMNS = [
    *measure.HEAD, "load", "waiting", "tokens", "tok_per_s", "quartiles", "over_openmp", "over_openmp_quartiles",
    "over_one_thread", "over_one_thread_quartiles",
]  # fmt: skip


def work() -> None:
    """Train, in a process of its own: a line says how many steps, and is answered by the tokens per second."""
    torch.manual_seed(0)
    command = Train()
    shape = Shape(command.width, command.layers, command.heads, command.hidden)
    model = sparsify(small_llama(shape, command.length), command.job().recipe, verbose=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids = torch.randint(ByteTokenizer.vocab_size, (command.batch, command.length))
    step(model, optimizer, ids)
    for line in sys.stdin:
        begun = time.perf_counter()
        for _ in range(int(line)):
            step(model, optimizer, ids)
        print(int(line) * ids.numel() / (time.perf_counter() - begun), flush=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    """Forward, backward, AdamW, fresh gradients."""
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def worker(program: str, threads_each: int) -> Iterator[subprocess.Popen[str]]:
    """A process that trains whenever it is told to, with no variable that says how threads wait but its own."""
    environment = {name: value for name, value in os.environ.items() if name not in (*threads.COUNTS, *threads.WAITS)}
    environment[threads.COUNTS[0]] = str(threads_each)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parent, env=environment, **pipes) as made:
        try:
            yield made
        finally:
            made.kill()


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Processes that compute all the time."""
    with ExitStack() as stack:
        for _ in range(processes):
            made = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(made.kill)
        yield


LOADS = {"idle": nullcontext, "one busy process": partial(busy, 1), "four busy processes": partial(busy, 4)}


def speed(process: subprocess.Popen[str], steps: int, turn: int) -> float:
    """Tokens per second of so many steps.

    Raises:
        RuntimeError: the process ended.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    if not (answer := process.stdout.readline()):
        raise RuntimeError("a training process ended; its error is above")
    return float(answer)


def main() -> None:
    options = measure.parser(__doc__, rounds=9, file="load-cpu.csv")
    options.set_defaults(threads=2)
    options.add_argument("--steps", type=int, default=5, help="training steps that are timed together")
    chosen = options.parse_args()
    head = measure.start(chosen)
    for _ in measure.points(chosen, head, [{}]):
        compare(chosen, head)


def compare(chosen: argparse.Namespace, head: dict[str, str]) -> None:
    """All in turn, under every load."""
    command = Train()
    threads_of = dict.fromkeys(PROGRAMS, chosen.threads) | {ONE: 1}
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(worker(PROGRAMS.get(name, PROGRAMS["command line"]), count))
            for name, count in threads_of.items()
        }
        ways = {name: partial(speed, process, chosen.steps) for name, process in processes.items()}
        measure.in_turn(ways, 1)  # all have started, and memory is warm
        for load, burden in LOADS.items():
            with burden():
                speeds = measure.in_turn(ways, chosen.rounds)
            rows = []
            for name, values in speeds.items():
                row = {"load": load, "waiting": name, "tokens": str(command.batch * command.length)}
                row |= {"threads": str(threads_of[name])} | measure.summary(("tok_per_s", "quartiles"), values)
                for column, base in (("over_openmp", "OpenMP"), ("over_one_thread", ONE)):
                    compared = measure.ratios(values, speeds[base])
                    row |= measure.summary((column, f"{column}_quartiles"), compared, ".3f")
                rows.append(head | row)
            measure.report(chosen.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
