"""Time one sparse layer side by side with transformers' implementations of the same experts.

Every implementation runs the same weights on the same decisions, in turn within one process (A B C A B C ...), and is
checked against the definition first. Rows are appended to `benchmarks/results/layer-<device>.csv`.

    python benchmarks/run.py                        the table of this machine
    python benchmarks/run.py --blocks tiny --tokens 256 --backward
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moeify.backends import compose, run
from moeify.experts import FFN, Experts
from moeify.experts.quantized import quantize
from moeify.kernels.packing import pack
from moeify.routing import assign

RESULTS = Path(__file__).parent / "results"
BLOCKS = {  # width, hidden, experts, k
    "tiny": (256, 512, 8, 2),
    "fine-grained": (1024, 512, 64, 8),
    "mixtral-like": (1024, 3584, 8, 2),
}
COLD = 2**28  # bytes of weights that take turns: more than the caches hold
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FIELDS = [
    "date", "commit", "device", "threads", "torch", "transformers", "block", "dtype", "tokens", "pass",
    "implementation", "median_ms", "quartiles_ms", "speedup_over_best_peer", "speedup_quartiles", "limit_ms",
    "share_of_limit",
]  # fmt: skip


class Block:
    """One set of weights, in the experts of transformers and in ours, which share them, and rounded."""

    def __init__(self, block: str, dtype: torch.dtype, device: str, backward: bool) -> None:
        width, hidden, num_experts, k = BLOCKS[block]
        config = transformers.MixtralConfig(
            hidden_size=width, intermediate_size=hidden, num_local_experts=num_experts, num_experts_per_tok=k
        )
        config._experts_implementation = "eager"
        self.native = MixtralExperts(config).to(device, dtype)
        for weight in self.native.parameters():
            nn.init.normal_(weight, std=0.02)
        self.ours = FFN(num_experts, width, hidden).to(device, dtype)
        self.ours.gate_up_proj, self.ours.down_proj = self.native.gate_up_proj, self.native.down_proj
        self.packed = copy.copy(self.ours)  # the same weights in a module that may be packed
        self.rounded = {}
        if not backward and device == "cpu":
            self.rounded = {f"moeify/int{bits}": quantize(self.ours, bits) for bits in (8, 4)}


class Case:
    """One block at one number of tokens: inputs, weights, decisions, and the ways to compute it.

    Several sets of weights take turns, as the layers of a model do, so that none is found in a cache.
    """

    def __init__(self, block: str, dtype: torch.dtype, tokens: int, device: str, backward: bool) -> None:
        width, hidden, self.num_experts, self.k = BLOCKS[block]
        torch.manual_seed(0)
        sets = max(2, min(24, COLD // (self.num_experts * 3 * width * hidden * dtype.itemsize)))
        self.blocks = [Block(block, dtype, device, backward) for _ in range(sets)]
        self.x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=backward)
        gates, self.index = torch.randn(tokens, self.num_experts, device=device).softmax(-1).topk(self.k)
        self.gates = (gates / gates.sum(-1, keepdim=True)).to(dtype)
        self.flops = 6 * tokens * self.k * width * hidden * (3 if backward else 1)
        self.read = len(self.index.unique()) * 3 * width * hidden * (3 if backward else 1)  # weights, in numbers
        self.backward, self.dtype, self.device = backward, dtype, device
        if device == "cpu" and not backward:
            for each in self.blocks:
                pack(each.packed)

    def ways(self) -> dict[str, Callable[[Block], Tensor]]:
        """Implementations by name; ours includes the sort, as theirs do."""
        theirs = [name for name in ("grouped_mm", "batched_mm") if name != "batched_mm" or len(self.x) <= 16]
        ours = {name: lambda block, name=name: self._run(block.rounded[name]) for name in self.blocks[0].rounded}
        if ours:
            ours["moeify/packed"] = lambda block: self._run(block.packed)
        return {
            "transformers/eager": lambda block: block.native(self.x, self.index, self.gates),
            **{
                f"transformers/{name}": lambda block, name=name: ALL_EXPERTS_FUNCTIONS[name](
                    block.native, self.x, self.index, self.gates
                )
                for name in theirs
            },
            "moeify": lambda block: self._run(block.ours),
            **ours,
        }

    def _run(self, experts: Experts) -> Tensor:
        return run("auto", self.x, assign(self.index, self.gates, self.num_experts), experts)

    def reference(self, way: str) -> Tensor:
        """The definition, of the rounded weights where they are rounded."""
        experts = self.blocks[0].rounded.get(way, self.blocks[0].ours)
        return compose(self.x, assign(self.index, self.gates, self.num_experts), experts)

    def limit(self, way: str) -> float:
        """Milliseconds in which the memory could be read, or the products computed, at best."""
        bytes_per_second, flops_per_second = limits(self.dtype, self.device)
        each = {"moeify/int8": 1.0, "moeify/int4": 0.5 + 4 / 64}.get(way, self.dtype.itemsize)  # 4 bits have scales
        return 1000 * max(self.read * each / bytes_per_second, self.flops / flops_per_second)

    def step(self, way: Callable[[Block], Tensor], turn: int) -> None:
        """One forward pass, or one forward and backward pass with fresh gradients."""
        block = self.blocks[turn % len(self.blocks)]
        if not self.backward:
            with torch.no_grad():
                way(block)
            return
        y = way(block)
        y.backward(torch.ones_like(y))
        self.x.grad = None
        for weight in block.native.parameters():
            weight.grad = None


@cache
def limits(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Bytes and FLOPs per second of this machine: the fastest read of a large tensor, the fastest product."""
    large = torch.zeros(2**26, device=device)
    read = min(_milliseconds(large.sum, device) for _ in range(9))
    side = 1024 if device == "cpu" else 8192
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    products = [lambda: left @ right.t()]
    if device == "cpu" and torch.backends.mkldnn.is_available():
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], ""))
    product = min(_milliseconds(way, device) for way in products for _ in range(9))
    return 1000 * large.nbytes / read, 1000 * 2 * side**3 / product


def measure(case: Case, device: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every implementation in every round."""
    ways = case.ways()
    for name, way in ways.items():
        with torch.no_grad():
            reference = case.reference(name).float()
            error = (way(case.blocks[0]).float() - reference).abs().max().item()
        allowed = 64 * torch.finfo(case.x.dtype).eps * reference.abs().max().item()
        if error > allowed:
            raise RuntimeError(f"{name} differs from the definition by {error:.3g} (allowed {allowed:.3g})")
        for turn in range(len(case.blocks)):
            case.step(way, turn)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):  # each round in an order of its own: what ran before leaves its mark on the caches
        for name, way in random.Random(turn).sample(list(ways.items()), len(ways)):
            times[name].append(_milliseconds(lambda way=way, turn=turn: case.step(way, turn), device))
    return times


def _milliseconds(function: Callable[[], None], device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def rows_of(times: dict[str, list[float]], limit: Callable[[str], float]) -> list[dict[str, str]]:
    """One row per implementation; the speed-up is over the peer with the lowest median, round by round.

    Args:
        times: milliseconds by implementation.
        limit: milliseconds that an implementation needs at least.
    """
    peers = [name for name in times if not name.startswith("moeify")]
    best = min(peers, key=lambda name: statistics.median(times[name]))
    rows = []
    for name, values in times.items():
        low, middle, high = quartiles(values)
        ratios = quartiles([b / v for b, v in zip(times[best], values, strict=True)])
        rows.append(
            {
                "implementation": name,
                "median_ms": f"{middle:.4g}",
                "quartiles_ms": f"{low:.4g}-{high:.4g}",
                "speedup_over_best_peer": f"{ratios[1]:.3f}",
                "speedup_quartiles": f"{ratios[0]:.3f}-{ratios[2]:.3f}",
                "limit_ms": f"{limit(name):.4g}",
                "share_of_limit": f"{limit(name) / middle:.3f}",
            }
        )
    return rows


def hardware(device: str) -> str:
    """What the benchmark runs on, as its rows name it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--blocks", nargs="+", default=list(BLOCKS), choices=list(BLOCKS))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256, 1024])
    parser.add_argument("--backward", action=argparse.BooleanOptionalAction, default=None, help="default: both")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hardware", help="the name of the hardware in the rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    head = {
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "device": options.hardware or hardware(options.device),
        "threads": str(options.threads),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    passes = [False, True] if options.backward is None else [options.backward]
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"layer-{options.device}.csv"
    is_new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, FIELDS)
        if is_new:
            writer.writeheader()
        for block in options.blocks:
            for dtype in options.dtypes:
                for tokens in options.tokens:
                    for backward in passes:
                        case = Case(block, DTYPES[dtype], tokens, options.device, backward)
                        what = {
                            "block": block, "dtype": dtype, "tokens": str(tokens),
                            "pass": "forward+backward" if backward else "forward",
                        }  # fmt: skip
                        for row in rows_of(measure(case, options.device, options.rounds), case.limit):
                            writer.writerow(head | what | row)
                            print(*what.values(), *row.values(), sep="  ")
                        out.flush()


if __name__ == "__main__":
    main()
