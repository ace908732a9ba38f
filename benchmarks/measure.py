"""Shared parts of the benchmarks: options, rows and their files, interleaved rounds, the limits of a machine."""

from __future__ import annotations

import argparse
import csv
import datetime
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from allowance import ALLOWANCE, LEFT_OUT
from conditions import Others, processor
from torch import Tensor

from moeify.kernels.cpu import onednn
from moeify.kernels.cpu.huge_pages import in_huge_pages

Key = TypeVar("Key", bound=Hashable)

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
LARGE = 2**26  # numbers that no cache holds
SIDE = {"cpu": 1024, "cuda": 8192}  # of a product that is as fast as any
HEAD = ["date", "commit", "device", "isa", "governor", "load_average", "others", "threads", "torch", "transformers"]
ENOUGH = 60  # seconds after which no further round starts, if there were three
OTHERS = Others()


def parser(
    description: str | None, *, rounds: int, file: str | None = None, picture: str | None = None
) -> argparse.ArgumentParser:
    """The options that all programs have.

    Args:
        description: the program's docstring.
        rounds: how often everything is measured.
        file: the name of its results, if it has but one file of them.
        picture: the name of what it draws.
    """
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=rounds, help=f"how often all is measured in turn ({rounds})")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--hardware", help="the name of the hardware in the rows")
    options.add_argument("--minutes", type=float, help="start nothing further after so long; fewer rounds, if need be")
    options.add_argument("--resume", action="store_true", help="leave out what --out holds of this commit and machine")
    options.add_argument("--out", type=Path, default=file and RESULTS / file, help="CSV file to append rows to")
    if picture:
        options.add_argument("--picture", type=Path, default=IMAGES / picture, help="what the rows look like")
    return options


def start(chosen: argparse.Namespace, device: str | None = None) -> dict[str, str]:
    """Set the number of threads, and say what every row begins with: when, by what and on what it was measured."""
    torch.set_num_threads(chosen.threads)
    ALLOWANCE.begin(chosen.minutes)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "device": chosen.hardware or device or hardware("cpu"),
        **processor(),
        "threads": str(chosen.threads),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def points(
    chosen: argparse.Namespace, begin: dict[str, str], all_points: Sequence[dict[str, str]]
) -> Iterator[dict[str, str]]:
    """The points that are to be measured, one after another, each with its part of the time that is left.

    With `--resume`, points are left out whose rows were measured at this commit on this machine in the same way.

    Args:
        chosen: the options.
        begin: what every row begins with.
        all_points: each as the columns by which its rows differ from those of the others.
    """
    file = chosen.out
    rows = list(csv.DictReader(file.read_text().splitlines())) if chosen.resume and file.exists() else []
    same = [name for name in begin if name not in ("date", "governor", "load_average")]
    have = [row for row in rows if all(row.get(name) == begin[name] for name in same)]
    todo = [point for point in all_points if not any(point.items() <= row.items() for row in have)]
    if len(todo) < len(all_points):
        print(f"{len(all_points) - len(todo)} of {len(all_points)} points are in {file} already")
    for number, point in enumerate(todo):
        if not ALLOWANCE.begin_point(len(todo) - number):
            print(f"the time is up, {len(todo) - number} of {len(all_points)} points are left; --resume measures them")
            return
        yield point


def hardware(device: str) -> str:
    """What the benchmark runs on, as its rows name it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else "CPU"


def report(file: Path, columns: Sequence[str], rows: Iterable[dict[str, str]]) -> None:
    """Print rows, and add them to a CSV file, which is begun if it is not there.

    The column `others` gets the cores that others used since the last call.

    Raises:
        ValueError: the file has other columns.
    """
    is_new = not file.exists()
    if not is_new and (others := next(csv.reader(file.read_text().splitlines()))) != list(columns):
        raise ValueError(f"{file} has the columns {others}, and not {list(columns)}; choose another --out")
    others = OTHERS.cores()
    if others.endswith("busy"):
        print(f"the machine was loaded, others used {others.split()[0]} cores: the next rows are marked")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, columns)
        if is_new:
            writer.writeheader()
        for row in rows:
            writer.writerow(row | ({"others": others} if "others" in columns else {}))
            print(*(row[column] for column in columns if column in row and column not in HEAD), sep="  ", flush=True)


def latest(file: Path, point: Sequence[str]) -> list[dict[str, str]]:
    """The last measured row of every point, on the hardware, by the instructions and with the threads of the last row.

    Args:
        file: a CSV file of results.
        point: columns that tell points apart.
    """
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    alike = [
        row
        for row in rows
        if all(row.get(column) == rows[-1].get(column) for column in ("device", "isa", "threads"))
        and not any(value.startswith(LEFT_OUT) for value in row.values())
    ]
    return list({tuple(row[column] for column in point): row for row in alike}.values())


def in_turn(ways: dict[Key, Callable[[int], float]], rounds: int) -> dict[Key, list[float]]:
    """What every way measures in every round; a way is called with the number of the round.

    Each round has an order of its own, as what ran before leaves its mark on the caches. Three rounds are enough where
    they take longer than `ENOUGH`, and one where the time that the program may take is up.
    """
    measured: dict[Key, list[float]] = {name: [] for name in ways}
    begun = time.monotonic()
    for turn in range(rounds):
        if (turn >= 3 and time.monotonic() - begun > ENOUGH) or (turn >= 1 and ALLOWANCE.is_late):
            break
        for name, way in random.Random(turn).sample(list(ways.items()), len(ways)):
            measured[name].append(way(turn))
    return measured


def timed(steps: dict[Key, Callable[[int], object]], device: str = "cpu") -> dict[Key, Callable[[int], float]]:
    """The ways that measure the milliseconds of steps."""
    return {name: lambda turn, step=step: milliseconds(lambda: step(turn), device) for name, step in steps.items()}


def milliseconds(function: Callable[[], object], device: str = "cpu") -> float:
    """How long a call takes."""
    if device == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        function()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after)
    begun = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - begun)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of one or two values the lower, the mean and the higher."""
    if len(values) < 3:
        return min(values), statistics.mean(values), max(values)
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def summary(columns: tuple[str, str], values: list[float], form: str = ".4g") -> dict[str, str]:
    """The median in one column, the quartiles around it in the other."""
    low, middle, high = quartiles(values)
    return dict(zip(columns, (f"{middle:{form}}", f"{low:{form}}-{high:{form}}"), strict=True))


def ratios(over: list[float], under: list[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def least(measured: dict[Key, list[float]]) -> list[float]:
    """The values with the lowest median: the best peer, where they are times."""
    return min(measured.values(), key=statistics.median)


def speedup(peers: dict[Key, list[float]], times: list[float]) -> dict[str, str]:
    """The columns of the speed-up over the best of some peers, round by round; none where there is no peer."""
    columns = ("speedup_over_best_peer", "speedup_quartiles")
    return summary(columns, ratios(least(peers), times), ".3f") if peers else {}


@cache
def limits(dtype: torch.dtype, device: str = "cpu") -> tuple[float, float]:
    """Bytes and FLOPs per second of this machine: the fastest read of large memory, the fastest product.

    On a CPU the product may be one in fp32, which holds the numbers of every dtype: some compute bf16 far more slowly.
    """
    large = torch.empty(LARGE, device=device)
    if device == "cpu":
        in_huge_pages(large)
    large.zero_()
    read = min(milliseconds(large.sum, device) for _ in range(9))
    dtypes = {dtype, torch.float32} if device == "cpu" else {dtype}  # fp32 holds the numbers of all, and may be faster
    product = min(milliseconds(way, device) for each in dtypes for way in _products(each, device) for _ in range(9))
    return 1000 * large.nbytes / read, 1000 * 2 * SIDE[device] ** 3 / product


def _products(dtype: torch.dtype, device: str) -> Iterator[Callable[[], Tensor]]:
    """Ways to multiply large matrices."""
    left, right = (torch.ones(SIDE[device], SIDE[device], device=device, dtype=dtype) for _ in range(2))
    yield lambda: left @ right.t()
    if device == "cpu" and onednn.can_pack(dtype):
        yield lambda: onednn.linear(left, right)


def at_best(nbytes: float, flops: float, dtype: torch.dtype, device: str = "cpu") -> float:
    """Milliseconds in which so much could be read and multiplied: the roofline."""
    bytes_per_second, flops_per_second = limits(dtype, device)
    return 1000 * max(nbytes / bytes_per_second, flops / flops_per_second)
