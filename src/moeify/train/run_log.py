"""`metrics.jsonl`, the log of a run: a line of JSON for every log entry, with the load of every expert."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerState

from moeify.files import write_text
from moeify.layers import sparse_layers
from moeify.notices import notify
from moeify.train.metrics import Tally, summarize

LOG = "metrics.jsonl"


def report(
    tally: Tally, logs: dict[str, float], state: TrainerState, folder: str | Path, model: nn.Module
) -> dict[str, float]:
    """Write the metrics since the last entry, with the trainer's log, and return the metrics of all layers.

    Args:
        tally: the metrics, which are reset.
        logs: what the trainer logs.
        state: of the trainer; its first rank writes.
        folder: of the run.
        model: whose selection biases are logged, as `bias_range`, the largest minus the smallest of a layer.
    """
    layers = tally.drain()
    figures = summarize(layers)
    if state.is_world_process_zero:
        for name, layer in sparse_layers(model).items():
            biases = [getattr(owner, key) for owner, key in layer.selection_biases()]
            whole = [bias for bias in biases if not isinstance(bias, DTensor)]  # only this rank is here
            if name in layers and whole:
                layers[name]["bias_range"] = max(float(bias.max() - bias.min()) for bias in whole)
        begin = {"step": state.global_step, "max_steps": state.max_steps, "time": time.time()}
        append(Path(folder) / LOG, begin | exact(logs | figures) | {"layers": layers})
    return figures


def exact(values: dict[str, Any]) -> dict[str, Any]:
    """The numbers, and for loss and gradient norm also the exact bits, so that equal runs have equal logs."""
    bits = {f"{name}_hex": float(values[name]).hex() for name in ("loss", "grad_norm") if name in values}
    return values | bits


def append(file: Path, record: dict[str, Any]) -> None:
    """Write one line of JSON, whole or not at all; a full disk costs the line and a warning, not the run."""
    line = (json.dumps(record, default=float) + "\n").encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab", buffering=0) as out:
            size = out.seek(0, os.SEEK_END)
            if out.write(line) < len(line):
                out.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        step = record.get("step")
        notify(f"moeify: the metrics of step {step} could not be written to {file} ({error}); the run goes on")


def forget_after(file: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will do again, and lines that a crash has cut off or damaged.

    Lines at the end are cut off in place, which a full disk allows; where it does not, a warning is printed.
    """
    if not file.exists():
        return
    try:
        whole = file.read_bytes()
        kept = b"".join(line + b"\n" for line in whole.split(b"\n") if _is_until(line, step))
        if whole.startswith(kept):
            os.truncate(file, len(kept))
        else:
            write_text(file, kept.decode())
    except OSError as error:
        notify(f"moeify: the metrics after step {step} could not be taken out of {file} ({error}); the run goes on")


def _is_until(line: bytes, step: int) -> bool:
    entry = parse(line)
    return entry is not None and entry["step"] <= step


def entries(file: Path) -> Iterator[dict[str, Any]]:
    """The entries of a log, oldest first; lines that a crash has cut off or damaged are skipped.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with file.open("rb") as lines:
        yield from (entry for line in lines if (entry := parse(line)) is not None)


def parse(line: bytes) -> dict[str, Any] | None:
    """The entry that a line holds, None if it is cut off or damaged."""
    try:
        entry = json.loads(line)
        return entry if isinstance(entry["step"], int) else None
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
