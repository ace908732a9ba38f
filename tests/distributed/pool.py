"""Ranks that live as long as the tests: processes joined by gloo, to which cases are given one after the other.

Starting a process takes seconds and a case milliseconds, so one pool serves every test of a session. All ranks are
forked off one server, which has read torch and moeify and runs no kernels: a fork of a process with threads of theirs
waits for them for ever. After a case that failed or took too long, ranks may wait in different collectives, so they are
thrown away, and the next case gets new ones.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

COLLECTIVE = 60.0
"""Seconds that a collective waits for a rank."""
CASE = 120.0
"""Seconds that cases may take, the start of their ranks included."""
REST = 1.0
"""Seconds that ranks have to tell that they failed too, once one of them has."""
PRELOAD = ("torch.distributed.fsdp", "torch.distributed.tensor.debug", "moeify.train")


class RankFailed(AssertionError):
    """A case raised on some rank, or a rank died or did not answer."""


class Pool:
    """Worlds of ranks, one for every number of ranks, each started when the first case for it arrives."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="moeify-ranks-")
        self.server: Any = None
        self.worlds: dict[int, list[Connection]] = {}
        self.starts = 0
        self.loaded = set(PRELOAD)

    def __call__(self, ranks: int, case: Callable[..., Any], *arguments: Any, timeout: float = CASE) -> list[Any]:
        """What each rank answers when all run `case(rank, ranks, *arguments)`.

        Args:
            ranks: how many.
            case: a function at the top level of a file, which ranks read again by its path; it may be in a test module.
            arguments: anything that pickle copies.
            timeout: seconds.

        Raises:
            RankFailed: with what every rank that failed raised.
        """
        return self.each(ranks, [(case, *arguments)], timeout)[0]

    def each(self, ranks: int, cases: Sequence[tuple[Any, ...]], timeout: float = CASE) -> list[list[Any]]:
        """The answers to several cases, which ranks run one after the other without waiting for this process."""
        jobs = pickle.dumps([(inspect.getfile(case), case.__qualname__, arguments) for case, *arguments in cases])
        lines = self._world(ranks)
        answers: dict[Connection, list[Any]] = {}
        errors: dict[Connection, str] = {}
        for line in lines:
            try:
                line.send_bytes(jobs)
            except OSError:
                errors[line] = "the process had died before the case"
        end = time.monotonic() + timeout
        while waiting := [line for line in lines if line not in answers and line not in errors]:
            ready = wait(waiting, max(end - time.monotonic(), 0))
            if not ready:
                errors |= dict.fromkeys(waiting, f"no answer within {timeout} seconds")
            for line in ready:
                try:
                    answer, error = pickle.loads(line.recv_bytes())
                except (EOFError, OSError):
                    answer, error = None, "the process died"
                if error is None:
                    answers[line] = answer
                else:
                    errors[line] = error
                    end = min(end, time.monotonic() + REST)
        if errors:
            self.end(ranks)
            raise RankFailed("\n".join(f"rank {r} of {ranks}: {errors[x]}" for r, x in enumerate(lines) if x in errors))
        return [list(of_case) for of_case in zip(*(answers[line] for line in lines), strict=True)]

    def preload(self, *modules: str) -> None:
        """Let the server import modules before it forks ranks, which then need not; ends the ranks that run."""
        if not set(modules) <= self.loaded:
            self.loaded |= set(modules)
            for ranks in list(self.worlds):
                self.end(ranks)
            if self.server is not None:
                self.orders.send(("import", modules))

    def end(self, ranks: int) -> None:
        """End the world of so many ranks, for example after a case that changes what others find there."""
        for line in self.worlds.pop(ranks):
            line.close()
        self.orders.send(("end", ranks))

    def close(self) -> None:
        """End all ranks and the server."""
        if self.server is not None:
            self.orders.close()  # where nobody can give an order any more, the server ends its ranks and itself
            self.server.join()
        for line in [line for world in self.worlds.values() for line in world]:
            line.close()
        self.worlds, self.server = {}, None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _world(self, ranks: int) -> list[Connection]:
        if self.server is None:
            context = multiprocessing.get_context("spawn")
            self.orders, orders = context.Pipe()
            self.server = context.Process(target=_serve, args=(orders, sorted(self.loaded)))
            self.server.start()
            orders.close()
            atexit.register(self.close)  # else an interpreter that ends by an error waits for the server for ever
        if ranks not in self.worlds:
            self.starts += 1
            self.orders.send(("start", (ranks, f"{self.folder}/{self.starts}")))
            self.worlds[ranks] = []
            for _ in range(ranks):
                ours, theirs = multiprocessing.Pipe()
                send_handle(self.orders, theirs.fileno(), self.server.pid)
                theirs.close()
                self.worlds[ranks].append(ours)
        return self.worlds[ranks]


def _serve(orders: Connection, modules: Sequence[str]) -> None:
    """Import, fork and end as ordered, and end everything when nobody can give orders any more."""
    fork = multiprocessing.get_context("fork")
    worlds: dict[int, list[Any]] = {}
    _import(modules)
    try:
        while True:
            order, what = orders.recv()
            if order == "import":
                _import(what)
            elif order == "end":
                _kill(worlds.pop(what))
            else:
                ranks, store = what
                worlds[ranks] = []
                for rank in range(ranks):
                    line = Connection(recv_handle(orders))
                    worlds[ranks].append(fork.Process(target=_rank, args=(rank, ranks, store, line, orders)))
                    worlds[ranks][-1].start()
                    line.close()  # it breaks when the rank dies, for nobody else holds this end
    except EOFError:
        for processes in worlds.values():
            _kill(processes)
        os._exit(0)


def _import(modules: Sequence[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _kill(processes: Sequence[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _rank(rank: int, ranks: int, store: str, line: Connection, orders: Connection) -> None:
    orders.close()
    torch.set_num_threads(1)  # two ranks of two threads would wait for each other's cores
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": f"{ranks}", "RANK": f"{rank}", "LOCAL_RANK": f"{rank}"}
    limit = timedelta(seconds=COLLECTIVE)
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks, timeout=limit)
    try:
        while True:
            jobs, answer, error = line.recv_bytes(), b"", None
            try:
                answer = [_run(rank, ranks, *job) for job in pickle.loads(jobs)]
            except Exception as raised:
                place = "".join(traceback.format_tb(raised.__traceback__)[-3:])
                error = f"{type(raised).__name__}: {raised}\n{place}"
            line.send_bytes(pickle.dumps((answer, error)))
    except (EOFError, OSError):
        os._exit(0)  # after collectives that autograd ran, the end of the interpreter may abort


def _run(rank: int, ranks: int, path: str, name: str, arguments: Sequence[Any]) -> Any:
    torch.manual_seed(0)
    random.seed(0)
    return getattr(_module(path), name)(rank, ranks, *arguments)


@cache
def _module(path: str) -> Any:
    """The file of a case; pytest imports test modules under names that ranks do not find."""
    name = f"case_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def group(size: int, first: int = 0) -> Any:
    """For cases: the ranks from `first` on as a group, made once; every rank of the world must ask for it."""
    return dist.new_group(list(range(first, first + size)))
