"""Processes of one machine that a claim runs as devices, joined by gloo."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

Rows = list[dict[str, Any]]


def rows_of_processes(number: int, work: Callable[[int], Rows]) -> Rows:
    """What the first of some processes found; they are forked off this one, which must not have run a kernel.

    Args:
        number: of processes, with a thread each.
        work: what each of them does, given its rank.

    Raises:
        SystemExit: a process failed; it has printed why.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(number):
            if not (child := os.fork()):
                try:
                    _run(rank, number, Path(folder), work)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                sys.stdout.flush()
                os._exit(0)
            children.append(child)
        ended = [os.waitpid(child, 0)[1] for child in children]
        if any(ended):
            raise SystemExit(f"a process of {number} failed")
        return json.loads(Path(folder, "rows.json").read_text())


def _run(rank: int, number: int, folder: Path, work: Callable[[int], Rows]) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), number)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=number)
    rows = work(rank)
    if rank == 0:
        (folder / "rows.json").write_text(json.dumps(rows))
    distributed.barrier()
