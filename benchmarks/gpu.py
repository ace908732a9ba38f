"""Check the kernels of a GPU, and time whole layers by them against their peers and their goals; ten minutes at most.

Everything is compared with the definition in float64 first, and nothing is timed where that fails. Then the ways to
compute a layer take turns within one process (A B C A B C ...), timed by CUDA events; decoding is replayed from CUDA
graphs. Rows are appended to `benchmarks/results/gpu.csv`, the goals are printed with pass or miss, and the roofline of
the guide is drawn anew.

    python benchmarks/gpu.py                        all
    python benchmarks/gpu.py --only G1 G8           some of the goals
    python benchmarks/gpu.py --dry-run              the same on a CPU and tiny shapes, without kernels and results
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from gpu_cases import GOALS, PEERS, Case, Goal, shrunk
from gpu_checks import check, check_linear, check_promises
from gpu_roofline import PICTURE, draw, measured
from measure import RESULTS, hardware, milliseconds, quartiles
from torch import Tensor
from torch.nn import functional as F

from moeify import backends
from moeify.backends import find_backend, register_backend
from moeify.experts import LoRA
from moeify.hf.interface import use_transformers_backends
from moeify.kernels import naive_grouped_linear
from moeify.routing import assign

FIELDS = [
    "date", "commit", "device", "torch", "triton", "transformers", "goal", "shape", "dtype", "pass",
    "implementation", "median_ms", "quartiles_ms", "tflops", "kept_mib",
]  # fmt: skip


def interleaved(ways: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, list[float]]:
    """Times of every way in every round, after two rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, way in ways.items():
            taken = milliseconds(way, device)
            if turn > 1:
                times[name].append(taken)
    return times


def replayed(ways: dict[str, Callable[[], Tensor]], times: int = 20) -> dict[str, Callable[[], object]]:
    """Every way as a CUDA graph of `times` passes; a way that cannot be captured is left out, with a word."""
    graphs: dict[str, Callable[[], object]] = {}
    for name, way in ways.items():
        try:
            way()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(times):
                    way()
            graphs[name] = graph.replay
        except RuntimeError as error:
            print(f"  {name} cannot be captured: {str(error).splitlines()[0]}")
    return graphs


def measure(goal: Goal, device: str, dtype: torch.dtype, rounds: int) -> list[dict[str, str]]:
    """Rows of results of one goal."""
    case, rows = Case(goal, device, dtype), []
    with torch.no_grad():
        ways, refused = case.ways()
        for name, reason in refused.items():
            print(f"  {name} does not serve {goal.name}: {reason}")
        repeats = 20 if goal.microseconds and device == "cuda" else 1
        passes = replayed(ways, repeats) if repeats > 1 else ways
        for name, values in interleaved(passes, device, rounds).items():
            rows.append(_row("forward", name, [v / repeats for v in values], goal.flops))
    if goal.microseconds:
        return rows
    case.train()
    ways, _ = case.ways()
    kept = {name: case.kept(way) for name, way in ways.items()}
    steps = {name: lambda way=way: case.backward(way) for name, way in ways.items()}
    for name, values in interleaved(steps, device, rounds).items():
        rows.append(_row("forward+backward", name, values, 3 * goal.flops) | {"kept_mib": f"{kept[name]:.4g}"})
    return rows


def _row(which: str, name: str, values: list[float], flops: int) -> dict[str, str]:
    low, middle, high = quartiles(values)
    return {
        "pass": which, "implementation": name, "median_ms": f"{middle:.4g}", "quartiles_ms": f"{low:.4g}-{high:.4g}",
        "tflops": f"{flops / middle / 1e9:.1f}", "kept_mib": "",
    }  # fmt: skip


def verdicts(goal: Goal, rows: list[dict[str, str]]) -> list[tuple[str, float, float, bool]]:
    """The goal, what was measured, and whether it is met."""
    found = {(row["pass"], row["implementation"]): row for row in rows}
    ours = "decode" if goal.tokens * goal.k <= goal.experts else "triton"  # as auto takes them
    which = "forward" if goal.microseconds else "forward+backward"
    lines: list[tuple[str, float, float, bool]] = []

    def ask(what: str, wanted: float, value: float, *, at_most: bool = False) -> None:
        if wanted:
            lines.append((what, wanted, value, value <= wanted if at_most else value >= wanted))

    for key, what, wanted in (
        ("forward", "forward TFLOP/s", goal.forward),
        ("forward+backward", "both TFLOP/s", goal.both),
    ):
        if (key, ours) in found:
            ask(what, wanted, float(found[key, ours]["tflops"]))
    if (which, ours) in found:
        mine = found[which, ours]
        ask("microseconds", goal.microseconds, 1000 * float(mine["median_ms"]), at_most=True)
        for peer, label in PEERS.items():
            if (which, peer) in found:
                ratio = float(found[which, peer]["median_ms"]) / float(mine["median_ms"])
                ask(f"times {peer}", goal.over.get(label, 0), ratio)
        theirs = found.get((which, "transformers/grouped_mm"))
        if theirs and theirs["kept_mib"]:
            ask("kept over P1", goal.kept, float(mine["kept_mib"]) / float(theirs["kept_mib"]), at_most=True)
    return lines


def adapters(device: str, dtype: torch.dtype, rounds: int, scale: int) -> dict[str, float]:
    """G9: the time of a frozen linear layer with 2 of 16 adapters of rank 16, over that of the layer alone."""
    width, num_experts, k, tokens = 2048 // scale, 16, 2, 8192 // scale
    lora = LoRA(num_experts, width, rank=16).to(device, dtype)
    x, base, upstream = (torch.randn(n, width, device=device, dtype=dtype) for n in (tokens, width, tokens))
    gates, index = torch.rand(tokens, num_experts, device=device).topk(k)
    ways = {
        "base": lambda: F.linear(x, base),
        "adapted": lambda: F.linear(x, base) + backends.run("triton", x, assign(index, gates, num_experts), lora),
    }

    def ratio(steps: dict[str, Callable[[], object]]) -> float:
        times = interleaved(steps, device, rounds)
        return statistics.median(times["adapted"]) / statistics.median(times["base"])

    with torch.no_grad():
        forward = ratio(ways)
    for leaf in (x, gates):
        leaf.requires_grad_()
    return {
        "forward": forward,
        "forward+backward": ratio({name: lambda way=way: way().backward(upstream) for name, way in ways.items()}),
    }


def versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="begin of the names of goals, such as G1 G8")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=9, help="start no further goal after so many")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU, by the definition")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run goes through the same steps on a CPU")
    begin, dry = time.monotonic(), options.dry_run
    device, dtype, rounds = ("cpu", torch.float32, 2) if dry else ("cuda", torch.bfloat16, options.rounds)
    goals = [goal for goal in GOALS if not options.only or any(goal.name.startswith(name) for name in options.only)]
    use_transformers_backends()
    if dry:
        linear = _plain_linear
        for name in ("triton", "decode"):
            register_backend(name, replace(find_backend("compose")))
    else:
        from moeify.kernels.triton import grouped_linear as linear

    print("against the definition in float64")
    wrong = check(device, "triton", "decode")
    if check_linear(device, linear) > 1e-4:
        wrong.append("grouped_linear")
    promises = {} if dry else check_promises(device)
    if wrong:
        raise SystemExit(f"not timed, as these differ from the definition: {', '.join(wrong)}")
    head = {
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "device": hardware(device),
        "dtype": str(dtype).removeprefix("torch."),
        **versions(),
    }
    table = [("G10", what, "", "", kept) for what, kept in promises.items()]
    results = []
    for goal in [shrunk(goal) for goal in goals] if dry else goals:
        if time.monotonic() - begin > 60 * options.minutes:
            print(f"{goal.name} is left out: {options.minutes:g} minutes are over")
            continue
        print(goal.name, goal.shape)
        rows = measure(goal, device, dtype, rounds)
        for row in rows:
            print("  ", *row.values(), sep="  ")
        results += [head | {"goal": goal.name, "shape": goal.shape} | row for row in rows]
        table += [(goal.name, what, f"{a:g}", f"{b:.3g}", met) for what, a, b, met in verdicts(goal, rows)]
    bounds = {"forward": 1.25, "forward+backward": 1.35}
    for which, ratio in adapters(device, dtype, rounds, 32 if dry else 1).items():
        met = ratio <= bounds[which]
        table.append(("G9", f"times the linear layer, {which}", f"{bounds[which]:g}", f"{ratio:.3g}", met))
    if not dry:
        write(results)
    for name, what, wanted, value, met in table:
        verdict = "not measured" if dry else "pass" if met else "miss"
        print(f"{name:8s} {what:40s} {wanted:>8s} {'' if dry else value:>8s}  {verdict}")
    if not dry:
        draw(measured())
        print(f"drawn: {PICTURE}")


def write(rows: list[dict[str, str]]) -> None:
    """Append rows to the results."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "gpu.csv"
    is_new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, FIELDS)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def _plain_linear(x: Tensor, weight: Tensor, counts: Tensor, *, source: Tensor | None = None) -> Tensor:
    return naive_grouped_linear(x if source is None else x[source], weight, counts)


if __name__ == "__main__":
    main()
