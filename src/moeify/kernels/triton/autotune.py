"""Choose tile sizes of the Triton kernels: from a static table, or autotuned with `MOEIFY_AUTOTUNE=1` and cached.

Sizes are measured once per GPU, kernel, dtype, widths and power of two of rows per expert, with balanced experts. Runs
that share the cache file use the same sizes; without the variable nothing is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from moeify import env
from moeify.files import read_json, write_json
from moeify.kernels.triton.activation import KernelActivation
from moeify.kernels.triton.activation_backward import activation_backward
from moeify.kernels.triton.config import Config, Kernel, table
from moeify.kernels.triton.launch import INTERPRETED, power_of_2
from moeify.kernels.triton.product import product
from moeify.kernels.triton.product_tn import product_tn
from moeify.kernels.triton.tiles import tile_table

CANDIDATES: dict[str, list[Config]] = {
    "product": [
        Config(128, 256, 64, 8, 3), Config(128, 256, 64, 8, 4), Config(128, 128, 64, 8, 4), Config(128, 128, 64, 4, 3),
        Config(64, 256, 64, 4, 3), Config(64, 128, 64, 4, 4), Config(16, 64, 128, 4, 4), Config(128, 128, 32, 8, 3),
    ],
    "activation_backward": [
        Config(128, 128, 64, 8, 4), Config(128, 128, 64, 8, 3), Config(128, 64, 64, 4, 4), Config(64, 128, 64, 4, 4),
        Config(16, 64, 128, 4, 4), Config(128, 128, 32, 8, 3),
    ],
    "product_tn": [
        Config(128, 256, 64, 8, 5), Config(256, 128, 64, 8, 5), Config(128, 128, 64, 8, 5), Config(128, 128, 64, 4, 5),
        Config(128, 128, 32, 8, 3),
    ],
}  # fmt: skip
Measure = Callable[[Config], float]


def config(kernel: Kernel, x: torch.Tensor, rows_per_expert: int, *widths: int) -> Config:
    """The tile sizes for a kernel: measured ones with `MOEIFY_AUTOTUNE=1`, those of the table without.

    Args:
        kernel: the kernel.
        x: the tokens or rows, for device and dtype.
        rows_per_expert: rows per expert on average.
        widths: dimensions of the weights; if 16 does not divide one, loads are not vectorised.
    """
    if INTERPRETED:
        return Config(16, 32, 32, 4, 2)
    if measures():
        return measured(kernel, x.device, x.dtype, rows_per_expert, widths)
    large = x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10)  # 12 is for desktops, with 100 KB
    return table("hopper" if large else "ampere", kernel, x.dtype, rows_per_expert, *widths)


def measures() -> bool:
    """Whether sizes are measured; never while a CUDA graph is captured."""
    return env.AUTOTUNE.is_on and not torch.cuda.is_current_stream_capturing()


def file() -> Path:
    """The file of measured sizes: `triton.json` in the cache folder."""
    return env.cache_folder() / "triton.json"


def tuned(key: str, candidates: list[Config], measure: Measure) -> Config:
    """The fastest candidate for a key: from the cache file, else measured and written to it.

    Args:
        key: identifies GPU, kernel, dtype and shapes.
        candidates: tile sizes; those that exceed the resources of the GPU are skipped.
        measure: the time of a candidate in milliseconds.
    """
    path = file()
    known = read_json(path) if path.exists() else {}
    if key not in known:
        times = {}
        for candidate in candidates:
            try:
                times[candidate] = measure(candidate)
            except triton.runtime.errors.OutOfResources:
                continue
        known[key] = asdict(min(times, key=lambda candidate: times[candidate]))
        write_json(path, known, indent=1, sort_keys=True)
    return Config(**known[key])


def measured(kernel: Kernel, device: torch.device, dtype: torch.dtype, rows: int, widths: tuple[int, ...]) -> Config:
    """The autotuned sizes for a kernel, `rows` rows per expert, and weights (M, D) or, for a layer, (M, D, O, H)."""
    rows = max(1, power_of_2(rows))
    key = "/".join(map(str, (torch.cuda.get_device_name(device), kernel, dtype, rows, *widths)))
    return tuned(key, CANDIDATES[kernel], lambda size: milliseconds(trial(kernel, device, dtype, rows, widths, size)))


def trial(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, rows: int, widths: tuple[int, ...], size: Config,
    num_experts: int = 8,
) -> Callable[[], object]:  # fmt: skip
    """A function that runs a kernel on random rows, `rows` for each of `num_experts` experts."""

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    (m, d), (o, h) = widths[:2], widths[2:] or widths[:2]
    counts, total = torch.full((num_experts,), rows, device=device), rows * num_experts
    source, x, dy = torch.randperm(total, device=device), floats(total, d), floats(total, o)
    tiles = tile_table(counts, total, size.m)
    if kernel == "product":
        weight = floats(num_experts, m, d)
        return lambda: product(x, source, weight, None, tiles, total, size)
    if kernel == "product_tn":
        left = floats(total, m)
        like = floats(num_experts, m, d)
        return lambda: product_tn(left, None, x, source, counts, like, size)
    activation = KernelActivation("silu", m == 2 * h)
    weight, down, before = torch.rand(total, device=device), floats(num_experts, o, h), floats(total, m)
    return lambda: activation_backward(dy, source, weight, down, before, tiles, size, activation)


def milliseconds(call: Callable[[], object], rounds: int = 9) -> float:
    """The median time of a call on the GPU in milliseconds, after two warm-up calls."""
    times = []
    for turn in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if turn > 1:
            times.append(start.elapsed_time(end))
    return statistics.median(times)
