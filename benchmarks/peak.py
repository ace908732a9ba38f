"""Measure the memory that one sparse layer needs beside its weights, side by side with transformers.

Every measurement is a process of its own: what was resident at most during one pass, as the system counts it and with
the libraries' own buffers, less what was resident before. Weights and tokens are there before; outputs, gradients and
whatever lies between are not, nor is what is kept for the next pass. A pass of a much smaller layer goes first, so that
the code of libraries does not count, and the C library gives freed memory back at once. Linux only.

    python benchmarks/peak.py
    python benchmarks/peak.py --blocks tiny --tokens 512 --rounds 1 --out /tmp/peak.csv
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from allowance import ALLOWANCE, torch_rate
from measure import HEAD, in_turn, least, parser, points, ratios, report, start, summary
from run import BLOCKS, DTYPES, Block, Case, is_peer
from torch import Tensor
from torch.nn import functional as F

from moeify.experts import FFN
from moeify.routing import assign

DTYPE = "bfloat16"
SMALL, FEW = (256, 128, 8, 2), 64  # the layer that goes first, and its tokens
LOOP = "segment loop"
FORWARD = ("transformers/eager", "transformers/grouped_mm", LOOP, "compose", "moeify")
WAYS = {"forward": FORWARD, "forward+backward": (*FORWARD, "moeify/recompute")}
FIELDS = [
    *HEAD, "block", "dtype", "tokens", "pass", "implementation", "weights_mib", "peak_mib", "quartiles_mib",
    "times_best_peer", "times_best_peer_quartiles", "times_segment_loop", "times_segment_loop_quartiles",
]  # fmt: skip


def ways(case: Case) -> dict[str, Callable[[Block], Tensor]]:
    """All that are compared, by name."""
    return case.ways() | {
        LOOP: lambda block: loop(case, block.ours),
        "compose": lambda block: case.compute(block.ours, "compose"),
        "moeify/recompute": lambda block: case.compute(block.ours, "recompute"),
    }


def loop(case: Case, experts: FFN) -> Tensor:
    """One expert after another, nothing kept between them: what a layer can hardly do without."""
    routing = assign(case.index, case.gates, case.num_experts)
    sizes = routing.counts.tolist()
    y = torch.zeros_like(case.x)
    for expert, (token, scale) in enumerate(zip(routing.source.split(sizes), routing.weight.split(sizes), strict=True)):
        gate, up = F.linear(case.x[token], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        outputs = F.linear(F.silu(gate) * up, experts.down_proj[expert])
        y.index_add_(0, token, outputs * scale.unsqueeze(1))
    return y


def peak(block: str, tokens: int, backward: bool, threads: int, way: str) -> float:
    """MiB beside the weights; to be called in a fresh process.

    Raises:
        ValueError: so few tokens that the peak does not show among what was resident before.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    small, case = (
        Case([Block(sizes, DTYPES[DTYPE], "cpu", bits=())], count, backward=backward)
        for sizes, count in ((SMALL, FEW), (BLOCKS[block], tokens))
    )
    small.step(ways(small)[way], 0)
    step = ways(case)[way]
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark falls to what is resident now
    before = resident("VmRSS")
    case.step(step, 0)
    if (found := resident("VmHWM") - before) <= 0:
        raise ValueError(f"{tokens} tokens of {block} need no memory that can be measured; give more --tokens")
    return found


def resident(which: str) -> float:
    """MiB of this process: now (VmRSS), or at most so far (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{which}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


def weights(block: str) -> float:
    """MiB of a block's weights."""
    width, hidden, num_experts, _ = BLOCKS[block]
    return 3 * width * hidden * num_experts * DTYPES[DTYPE].itemsize / 2**20


def flops(block: str, which: str, tokens: int) -> float:
    """Of a pass."""
    width, hidden, _, k = BLOCKS[block]
    return 6 * tokens * k * width * hidden * (1 if which == "forward" else 3)


def rows_of(peaks: dict[str, list[float]], left_out: dict[str, str]) -> list[dict[str, str]]:
    """One row per way; ratios are over the thriftiest of transformers' ways, and over the segment loop.

    Args:
        peaks: MiB of every round.
        left_out: why others have none.
    """
    bases = {"times_segment_loop": {LOOP: peaks[LOOP]} if LOOP in peaks else {}}
    bases["times_best_peer"] = {name: values for name, values in peaks.items() if is_peer(name)}
    rows = []
    for name, values in peaks.items():
        row = {"implementation": name} | summary(("peak_mib", "quartiles_mib"), values)
        for column, base in bases.items():
            if base:
                row |= summary((column, f"{column}_quartiles"), ratios(values, least(base)), ".3f")
        rows.append(row)
    return rows + [{"implementation": name, "quartiles_mib": reason} for name, reason in left_out.items()]


def main() -> None:
    options = parser(__doc__, rounds=3, file="peak-cpu.csv")
    options.add_argument("--blocks", nargs="+", default=["mixtral-like", "fine-grained"], choices=list(BLOCKS))
    options.add_argument("--passes", nargs="+", default=list(WAYS), choices=list(WAYS))
    options.add_argument("--tokens", type=int, default=4096)
    chosen = options.parse_args()
    begin = start(chosen) | {"dtype": DTYPE, "tokens": str(chosen.tokens)}
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("forkserver")  # forks off a process that has loaded all and run nothing
    context.set_forkserver_preload(["run"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        wanted = [{"block": block, "pass": which} for block in chosen.blocks for which in chosen.passes]
        for what in points(chosen, begin, wanted):
            block, which = what.values()
            task = partial(peak, block, chosen.tokens, which != "forward", chosen.threads)
            rate = torch_rate(DTYPES[DTYPE], which != "forward")
            left_out, measured = {}, {}
            for way in WAYS[which]:
                reason = None
                if not way.startswith("moeify"):
                    reason = ALLOWANCE.refuse(flops(block, which, chosen.tokens), rate, 1)
                if reason:
                    left_out[way] = reason
                else:
                    measured[way] = lambda turn, way=way, task=task: pool.apply(task, (way,))
            peaks = in_turn(measured, chosen.rounds)
            more = {"weights_mib": f"{weights(block):.4g}"}
            report(chosen.out, FIELDS, [begin | what | more | row for row in rows_of(peaks, left_out)])


if __name__ == "__main__":
    main()
