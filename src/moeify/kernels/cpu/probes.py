"""What was measured on this processor to select the faster of two ways, kept in the cache for later processes."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from moeify import env
from moeify.files import read_json, write_json

Answer = TypeVar("Answer", bool, int)

_FACTS = ("vendor_id", "cpu family", "model", "model name", "stepping", "CPU implementer", "CPU part", "CPU variant")


def remembered(question: str, measure: Callable[[], Answer]) -> Answer:
    """The answer that an earlier process measured on a processor like this one, else measure and keep it.

    The file holds what distinguishes processors as well, so a home folder may be shared by several. A damaged file is
    replaced; where none can be written, each process measures for itself.

    Args:
        question: what is measured, with all that the answer depends on apart from processor and versions.
        measure: the measurement; runs in inference mode and must draw no random numbers.
    """
    known = _answers()
    if question in known:
        return known[question]
    with torch.inference_mode():
        found = measure()
    try:
        write_json(file(), {"machine": _machine(), "answers": _answers() | {question: found}}, sort_keys=True)
    except OSError as error:
        logging.getLogger(__name__).info("measured for this process only: %s", error)
    return found


def _answers() -> dict[str, Any]:
    """What the file holds; nothing if it is damaged or missing."""
    try:
        return dict(read_json(file())["answers"]) if file().exists() else {}
    except (KeyError, TypeError, ValueError, OSError):
        return {}


def file() -> Path:
    """The file of answers for this processor, level of instructions and version of torch."""
    machine = hashlib.sha256(repr(sorted(_machine().items())).encode()).hexdigest()[:16]
    return env.cache_folder() / "probes" / f"{machine}.json"


def _machine() -> dict[str, str]:
    """All but the question that decides which way is faster."""
    return _processor() | {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA") or "all instructions",
        "mkl": os.environ.get("MKL_ENABLE_INSTRUCTIONS") or "all instructions",
    }


@cache
def _processor() -> dict[str, str]:
    facts = {"architecture": platform.machine(), "processor": platform.processor()}
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0]
    except OSError:
        return facts
    lines = (line.partition(":") for line in first.splitlines())
    return facts | {name.strip(): value.strip() for name, _, value in lines if name.strip() in _FACTS}


def shortest(*ways: Callable[[], object], rounds: int = 9) -> list[float]:
    """The shortest time of each function in seconds; they alternate, so that load affects all, after a warm-up.

    With one thread it is CPU time, as what else runs on the machine may not decide for all later processes.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds + 1):
        for way, taken in zip(ways, times, strict=True):
            start = clock()
            way()
            taken.append(clock() - start)
    return [min(taken[1:]) for taken in times]
