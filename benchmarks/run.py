"""Time one sparse layer side by side with transformers' implementations of the same experts.

Every implementation runs the same weights on the same decisions, in turn within one process (A B C A B C ...), and is
checked against the definition first. Rows are appended to `benchmarks/results/layer-<device>.csv`.

    python benchmarks/run.py                        the table of this machine
    python benchmarks/run.py --blocks tiny --tokens 256 --backward
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moeify.backends import compose, run
from moeify.experts import FFN
from moeify.routing import assign

RESULTS = Path(__file__).parent / "results"
BLOCKS = {  # width, hidden, experts, k
    "tiny": (256, 512, 8, 2),
    "fine-grained": (1024, 512, 64, 8),
    "mixtral-like": (1024, 3584, 8, 2),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FIELDS = [
    "date", "commit", "device", "threads", "torch", "transformers", "block", "dtype", "tokens", "pass",
    "implementation", "median_ms", "quartiles_ms", "speedup_over_best_peer", "speedup_quartiles",
]  # fmt: skip


class Case:
    """One block at one number of tokens: inputs, weights, decisions, and the ways to compute it."""

    def __init__(self, block: str, dtype: torch.dtype, tokens: int, device: str, backward: bool) -> None:
        width, hidden, num_experts, k = BLOCKS[block]
        torch.manual_seed(0)
        config = transformers.MixtralConfig(
            hidden_size=width, intermediate_size=hidden, num_local_experts=num_experts, num_experts_per_tok=k
        )
        config._experts_implementation = "eager"
        self.native = MixtralExperts(config).to(device, dtype)
        for weight in self.native.parameters():
            nn.init.normal_(weight, std=0.02)
        self.ours = FFN(num_experts, width, hidden).to(device, dtype)
        self.ours.load_state_dict(self.native.state_dict())
        self.x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=backward)
        gates, self.index = torch.randn(tokens, num_experts, device=device).softmax(-1).topk(k)
        self.gates = (gates / gates.sum(-1, keepdim=True)).to(dtype)
        self.num_experts, self.backward = num_experts, backward

    def ways(self) -> dict[str, Callable[[], Tensor]]:
        """Implementations by name; ours includes the sort, as theirs do."""
        peers = {
            f"transformers/{name}": lambda name=name: ALL_EXPERTS_FUNCTIONS[name](
                self.native, self.x, self.index, self.gates
            )
            for name in ("grouped_mm", "batched_mm")
            if name != "batched_mm" or len(self.x) <= 16
        }
        return {
            "transformers/eager": lambda: self.native(self.x, self.index, self.gates),
            **peers,
            "moeify": self._ours,
        }

    def _ours(self) -> Tensor:
        return run("auto", self.x, assign(self.index, self.gates, self.num_experts), self.ours)

    def reference(self) -> Tensor:
        """The definition."""
        return compose(self.x, assign(self.index, self.gates, self.num_experts), self.ours)

    def step(self, way: Callable[[], Tensor]) -> None:
        """One forward pass, or one forward and backward pass with fresh gradients."""
        if not self.backward:
            with torch.no_grad():
                way()
            return
        y = way()
        y.backward(torch.ones_like(y))
        self.x.grad = None
        for weight in (*self.native.parameters(), *self.ours.parameters()):
            weight.grad = None


def measure(case: Case, device: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every implementation in every round."""
    ways = case.ways()
    reference = case.reference().float()
    tolerance = 64 * torch.finfo(case.x.dtype).eps * reference.abs().max().item()
    for name, way in ways.items():
        error = (way().float() - reference).abs().max().item()
        if error > tolerance:
            raise RuntimeError(f"{name} differs from the definition by {error:.3g} (allowed {tolerance:.3g})")
        case.step(way)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(_milliseconds(lambda way=way: case.step(way), device))
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


def rows_of(times: dict[str, list[float]]) -> list[dict[str, str]]:
    """One row per implementation; the speed-up is over the peer with the lowest median, round by round."""
    peers = [name for name in times if name != "moeify"]
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
                        for row in rows_of(measure(case, options.device, options.rounds)):
                            writer.writerow(head | what | row)
                            print(*what.values(), *row.values(), sep="  ")
                        out.flush()


if __name__ == "__main__":
    main()
