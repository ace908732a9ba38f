"""Shared parts of the benchmarks: options, rows and their files, interleaved rounds, the limits of a machine."""

from __future__ import annotations

import argparse
import csv
import datetime
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from conditions import Others, processor

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
    options.add_argument("--out", type=Path, default=file and RESULTS / file, help="CSV file to append rows to")
    if picture:
        options.add_argument("--picture", type=Path, default=IMAGES / picture, help="what the rows look like")
    return options


def start(chosen: argparse.Namespace, device: str | None = None) -> dict[str, str]:
    """Set the number of threads, and say what every row begins with: when, by what and on what it was measured."""
    torch.set_num_threads(chosen.threads)
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
    """The last row of every point, of those measured on the hardware and with the threads of the last row of all.

    Args:
        file: a CSV file of results.
        point: columns that tell points apart.
    """
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    alike = [row for row in rows if all(row[column] == rows[-1][column] for column in ("device", "threads"))]
    return list({tuple(row[column] for column in point): row for row in alike}.values())


def in_turn(ways: dict[Key, Callable[[int], float]], rounds: int) -> dict[Key, list[float]]:
    """What every way measures in every round; a way is called with the number of the round.

    Each round has an order of its own, as what ran before leaves its mark on the caches. Three rounds are enough where
    they take longer than `ENOUGH`.
    """
    measured: dict[Key, list[float]] = {name: [] for name in ways}
    begun = time.monotonic()
    for turn in range(rounds):
        if turn >= 3 and time.monotonic() - begun > ENOUGH:
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


@cache
def limits(dtype: torch.dtype, device: str = "cpu") -> tuple[float, float]:
    """Bytes and FLOPs per second of this machine: the fastest read of large memory, the fastest product."""
    large = torch.empty(LARGE, device=device)
    if device == "cpu":
        in_huge_pages(large)
    large.zero_()
    read = min(milliseconds(large.sum, device) for _ in range(9))
    side = SIDE[device]
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    products = [lambda: left @ right.t()]
    if device == "cpu" and onednn.can_pack(dtype):
        products.append(lambda: onednn.linear(left, right))
    product = min(milliseconds(way, device) for way in products for _ in range(9))
    return 1000 * large.nbytes / read, 1000 * 2 * side**3 / product


def at_best(nbytes: float, flops: float, dtype: torch.dtype, device: str = "cpu") -> float:
    """Milliseconds in which so much could be read and multiplied: the roofline."""
    bytes_per_second, flops_per_second = limits(dtype, device)
    return 1000 * max(nbytes / bytes_per_second, flops / flops_per_second)
