"""Decode with a sparse model, and with a dense one as much larger than its active part as Llama 2 70B than Mixtral's.

Mixtral 8x7B reads 12.9 B parameters per token, Llama 2 70B all of its 70 B, and Mixtral is said to be six times as
fast. The models here, of `decode.py`, have that ratio of sizes, random weights and 16 bits. They decode one to 256
sequences at once by transformers and by moeify, all in turn within one process. The more sequences, the more experts
are chosen by some of them, and the less of the sparse model is left unread: a row names the experts chosen per layer,
and the speeds that memory (bytes of the weights that a step reads / bandwidth) and products (FLOPs / fastest product)
allow. Where products in bf16 are so slow that there is no time for a way, its row says so.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --models sparse --rounds 1 --out /tmp/roofline.csv --picture /tmp/roofline.png
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from allowance import ALLOWANCE, torch_rate
from decode import MODELS, Bandwidth, build, bytes_per_step, decode, twin
from measure import HEAD, in_turn, latest, limits, parser, points, quartiles, ratios, report, start, summary
from pictures import draw_roofline
from torch import nn

from moeify.flops import count
from moeify.record import observe
from moeify.routing import Routing

DENSE = "dense-larger"
FIELDS = [
    *HEAD, "model", "implementation", "batch", "tok_per_s", "quartiles", "speedup_over_best_peer", "speedup_quartiles",
    "over_dense", "over_dense_quartiles", "experts_chosen", "gb_per_step", "bandwidth_gb_per_s", "memory_limit",
    "product_limit", "share_of_limit",
]  # fmt: skip
POINT = ("model", "implementation", "batch")

Way = tuple[str, str, int]
"""A model, an implementation and a batch."""


def experts_chosen(model: nn.Module, batch: int) -> float | None:
    """How many experts of a layer some sequence chooses of a step, in the mean; None in a dense model."""
    if not hasattr(model.config, "num_local_experts"):
        return None
    chosen: list[int] = []

    def see(layer: str, routing: Routing) -> None:
        chosen.append(int(routing.counts.count_nonzero()))

    handles = observe(model, see)
    decode(model, batch, 2, prompt=1)
    for handle in handles:
        handle.remove()
    return statistics.mean(chosen)


def ways(name: str, model: nn.Module) -> dict[str, Callable[..., float]]:
    """By what one of the models is run."""
    contenders = {"moeify": partial(speed, twin(model, 16), None)}
    if hasattr(model.config, "num_local_experts"):
        contenders |= {f"transformers/{each}": partial(speed, model, each) for each in ("eager", "grouped_mm")}
    else:
        contenders["transformers"] = partial(speed, model, None)
    return contenders


def speed(model: nn.Module, implementation: str | None, batch: int, turn: int = 0) -> float:
    """Tokens per second of all sequences; the more sequences, the fewer tokens of each are timed."""
    if implementation is not None:
        model.set_experts_implementation(implementation)
    return decode(model, batch, generated(batch), prompt=1)


def generated(batch: int) -> int:
    """Tokens of each sequence that are timed."""
    return max(2, min(32, 64 // batch))


def best_of(speeds: dict[Way, list[float]], model: str, batch: int, among: str = "transformers") -> list[float] | None:
    """The speeds of the fastest way, of those whose names begin so; None if all were left out."""
    here = {way: values for (name, way, b), values in speeds.items() if (name, b) == (model, batch)}
    return max((values for way, values in here.items() if way.startswith(among)), key=statistics.median, default=None)


def rows_of(speeds: dict[Way, list[float]], beside: dict[tuple[str, int], dict[str, float]]) -> list[dict[str, str]]:
    """One row per way; ratios are taken round by round.

    The dense model runs in the fastest way there is, beside transformers' sparse one in the fastest of transformers.

    Args:
        speeds: tokens per second of every round.
        beside: by model and batch what the columns of that name hold, limits in tokens per second among them.
    """
    rows = []
    for (model, implementation, batch), values in speeds.items():
        row = {"model": model, "implementation": implementation, "batch": str(batch)}
        row |= summary(("tok_per_s", "quartiles"), values)
        if peer := best_of(speeds, model, batch):
            row |= summary(("speedup_over_best_peer", "speedup_quartiles"), ratios(values, peer), ".3f")
        among = "" if implementation == "moeify" else "transformers"
        if model != DENSE and (dense := best_of(speeds, DENSE, batch, among)):
            row |= summary(("over_dense", "over_dense_quartiles"), ratios(values, dense), ".3f")
        here = beside[model, batch]
        row |= {column: f"{value:.4g}" for column, value in here.items()}
        share = quartiles(values)[1] / min(here["memory_limit"], here["product_limit"])
        rows.append(row | {"share_of_limit": f"{share:.3f}"})
    return rows


def limits_of(model: nn.Module, batch: int, bandwidth: float) -> dict[str, float]:
    """Columns beside the measured ones.

    Args:
        model: one of the models of transformers.
        batch: sequences decoded at once.
        bandwidth: GB per second.
    """
    chosen = experts_chosen(model, batch)
    gigabytes = bytes_per_step(model, 16, chosen) / 1e9
    return ({} if chosen is None else {"experts_chosen": chosen}) | {
        "gb_per_step": gigabytes,
        "bandwidth_gb_per_s": bandwidth,
        "memory_limit": batch * bandwidth / gigabytes,
        "product_limit": limits(torch.bfloat16)[1] / count(model).flops,
    }


def main() -> None:
    options = parser(__doc__, rounds=3, file="roofline-cpu.csv", picture="cpu-roofline.png")
    options.add_argument("--models", nargs="+", default=["sparse", DENSE], choices=list(MODELS))
    options.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    chosen = options.parse_args()
    begin = start(chosen)
    models: dict[str, nn.Module] = {}
    contenders: dict[tuple[str, str], Callable[..., float]] = {}
    for what in points(chosen, begin, [{"batch": str(batch)} for batch in chosen.batches]):
        models = models or {name: build(name) for name in chosen.models}
        contenders = contenders or {(name, way): go for name, m in models.items() for way, go in ways(name, m).items()}
        rows = measure(models, contenders, int(what["batch"]), chosen.rounds)
        report(chosen.out, FIELDS, [begin | row for row in rows])
    if chosen.out.exists():
        draw_roofline(latest(chosen.out, POINT), chosen.picture)


def measure(
    models: dict[str, nn.Module], contenders: dict[tuple[str, str], Callable[..., float]], batch: int, rounds: int
) -> list[dict[str, str]]:
    """The rows of a batch; all models take turns."""
    tasks: dict[Way, Callable[[int], float]] = {("memory", "read", 0): Bandwidth()}
    left_out = []
    for (name, way), go in contenders.items():
        rate = limits(torch.bfloat16)[1] if way == "moeify" else torch_rate(torch.bfloat16)
        reason = ALLOWANCE.refuse(batch * (2 + generated(batch)) * count(models[name]).flops, rate, 1)
        if reason:
            left_out.append({"model": name, "implementation": way, "batch": str(batch), "quartiles": reason})
        else:
            tasks[name, way, batch] = partial(go, batch)
    speeds = in_turn(tasks, rounds)
    bandwidth = statistics.median(speeds.pop(("memory", "read", 0)))
    beside = {(name, batch): limits_of(model, batch, bandwidth) for name, model in models.items()}
    return rows_of(speeds, beside) + left_out


if __name__ == "__main__":
    main()
