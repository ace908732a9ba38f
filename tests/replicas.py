"""Replicas of a training as processes that a test kills, and what they wrote down of every step.

They are forked off a process that has imported everything and runs no kernel itself. torchft is imported in them alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import numpy
import torch

from moeify.balance import PID, SMEBU, Quantile, Sign, SparsityTarget
from moeify.losses import z
from moeify.routers import TopK
from moeify.sparsify import Recipe, sparsify
from moeify.train import SparseArguments
from tiny_models import VOCABULARY, causal_lm, deepseek_v3

MICRO_BATCHES = 6
FOR_EVER = 10**6


def llama(**router):
    biased = partial(TopK, k=2, selection_bias=True, **router)
    torch.manual_seed(0)
    model = causal_lm("llama", attention_dropout=0.1)
    return sparsify(model, Recipe(num_experts=4, router=biased), verbose=False)


CASES = {
    "sign": (llama, SparseArguments(balance=0.1, controller=Sign(0.01))),
    "quantile": (llama, SparseArguments(balance=0.1, controller=Quantile(0.5))),
    "smebu": (llama, SparseArguments(balance=0.1, controller=SMEBU(0.01), losses=[(SparsityTarget(2.5), z)])),
    "native": (
        partial(deepseek_v3, attention_dropout=0.1),
        SparseArguments(balance=0.1, controller=PID(0.1, 0.1, 0.1)),
    ),
}


def digests(replica) -> dict[str, str]:
    """SHA-256 of the parts of a replica's state, and of its random numbers."""
    parts: dict[str, list[bytes]] = {"random": [torch.get_rng_state().numpy().tobytes()]}
    parts["random"] += [repr(random.getstate()).encode(), repr(numpy.random.get_state(legacy=True)).encode()]
    state = replica.state()
    for name, tensor in sorted(state.tensors.items()):
        kind = name.partition("|")[0]
        if kind == "model":
            kind = "biases" if "bias" in name else "experts" if ".experts." in name else "rest"
        parts.setdefault(kind, []).extend([name.encode(), tensor.numpy().tobytes()])
    parts["numbers"] = [json.dumps(state.numbers, sort_keys=True).encode()]
    return {kind: hashlib.sha256(b"|".join(values)).hexdigest() for kind, values in parts.items()}


def train(address: str, case: str, name: str, log: Path, steps: int) -> None:
    from moeify.integrations.torchft import Batches, Replica

    torch.set_num_threads(1)
    build, sparse = CASES[case]
    model = build()
    if log.exists():  # a replica that starts again has other weights and random numbers than those that live
        torch.manual_seed(os.getpid())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
    ids = torch.randint(3, VOCABULARY, (50, 12), generator=torch.Generator().manual_seed(0))
    batches = Batches([{"input_ids": row, "labels": row} for row in ids], size=2, micro_batches=MICRO_BATCHES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    with (
        Replica(
            model, optimizer, sparse, scheduler=schedule, seed=7, lighthouse=address, name=name, max_grad_norm=1.0,
            timeout=20.0,
        ) as replica,
        log.open("a", buffering=1) as file,
    ):  # fmt: skip
        for step in replica.train(batches, steps):
            row = vars(step) | {"pid": os.getpid(), "time": time.monotonic(), "digests": digests(replica)}
            file.write(json.dumps(row) + "\n")


def lighthouse(address: Path) -> None:
    from torchft.coordination import LighthouseServer

    server = LighthouseServer("[::]:0", 1, join_timeout_ms=5000, quorum_tick_ms=20, heartbeat_timeout_ms=1000)
    address.write_text(server.address())
    signal.pause()


def fork(work, *arguments, output: Path) -> int:
    """Start a process, whose output goes to a file."""
    if child := os.fork():
        return child
    to = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(to, 1)
    os.dup2(to, 2)
    code = 1
    try:
        work(*arguments)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(code)


class Training:
    """Some replicas of a training and their lighthouse; they are killed at the end."""

    def __init__(self, folder: Path, case: str, replicas: int, steps: int = FOR_EVER) -> None:
        self.folder, self.case, self.steps = folder, case, steps
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "address"
        self.processes = {"lighthouse": fork(lighthouse, file, output=folder / "lighthouse.out")}
        self.wait(lambda: file.exists() and file.read_text())
        self.address = file.read_text()
        for i in range(replicas):
            self.start(f"replica{i}")

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.kill(name)

    def start(self, name: str) -> None:
        arguments = self.address, self.case, name, self.folder / name, self.steps
        self.processes[name] = fork(train, *arguments, output=self.folder / f"{name}.out")

    def kill(self, name: str) -> None:
        child = self.processes.pop(name)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    def rows(self, name: str) -> list[dict]:
        """What a replica wrote down in all its lives."""
        file = self.folder / name
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def committed(self, name: str) -> list[dict]:
        """The steps that counted, of the process that lives."""
        child = self.processes.get(name)
        return [row for row in self.rows(name) if row["committed"] and row["pid"] == child]

    def wait(self, until, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while not until():
            for name, child in list(self.processes.items()):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    self.processes.pop(name)
                    if status:
                        raise RuntimeError(f"{name} ended:\n{(self.folder / f'{name}.out').read_text()[-4000:]}")
            if time.monotonic() > end:
                tails = [path.read_text()[-2000:] for path in self.folder.glob("*.out")]
                raise TimeoutError(f"nothing happened for {seconds} s:\n" + "\n---\n".join(tails))
            time.sleep(0.01)

    def wait_for(self, names, steps: int) -> None:
        """Until each of these replicas has taken so many more steps that counted."""
        before = {name: len(self.committed(name)) for name in names}
        self.wait(lambda: all(len(self.committed(name)) >= before[name] + steps for name in names))

    def different(self) -> list[str]:
        """Where replicas that took the same step have states that are not equal, bit for bit."""
        seen: dict[int, dict[str, str]] = {}
        odd = []
        for name in sorted({path.name for path in self.folder.glob("replica?")}):
            for row in self.rows(name):
                if row["committed"]:
                    first = seen.setdefault(row["number"], row["digests"])
                    unequal = [kind for kind in first if first[kind] != row["digests"][kind]]
                    odd += [f"{kind} of {name} after step {row['number']}" for kind in unequal]
        return odd
