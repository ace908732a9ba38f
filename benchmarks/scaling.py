"""Time one sparse layer as experts are added: time should grow with the active parameters, not with all.

Layers of 8 to 128 experts of one size, of which every token asks two, and the dense network of equal active size all
run in turn within one process, by moeify (`auto`, and with packed weights) and by transformers. A row holds the time,
its ratio to the best of transformers' implementations of the same layer, to the dense network and to the fewest
experts, and the limit: the larger of (bytes of the chosen experts / bandwidth) and (FLOPs / fastest product).

    python benchmarks/scaling.py
    python benchmarks/scaling.py --experts 8 16 --tokens 1 --rounds 1 --out /tmp/scaling.csv --picture /tmp/scaling.png
"""

from __future__ import annotations

import torch
from allowance import ALLOWANCE, torch_rate
from measure import (
    HEAD,
    at_best,
    in_turn,
    latest,
    milliseconds,
    parser,
    points,
    quartiles,
    ratios,
    report,
    speedup,
    start,
    summary,
    timed,
)
from pictures import draw_scaling
from run import PASSES, PATIENCE, Block, Case, Sizes, blocks_of, is_peer, timers
from torch import Tensor
from torch.nn import functional as F

WIDTH, HIDDEN, K = 512, 1024, 2
DTYPE = torch.bfloat16
SETS = 24  # of dense weights, that take turns as those of the experts do
FIELDS = [
    *HEAD, "dtype", "experts", "tokens", "implementation", "median_ms", "quartiles_ms", "speedup_over_best_peer",
    "speedup_quartiles", "times_dense", "times_dense_quartiles", "times_fewest", "times_fewest_quartiles",
    "limit_ms", "share_of_limit",
]  # fmt: skip
POINT = ("experts", "tokens", "implementation")

Times = dict[tuple[int, str], list[float]]
"""Milliseconds of every round by number of experts and implementation; the dense network has one expert."""


def sizes(num_experts: int) -> Sizes:
    """Of a layer; what a token asks of it does not depend on the number of experts."""
    return WIDTH, HIDDEN, num_experts, K


class Dense:
    """The feed-forward network that computes as much per token as K experts do."""

    def __init__(self) -> None:
        self.up = torch.randn(2 * K * HIDDEN, WIDTH, dtype=DTYPE) * 0.02
        self.down = torch.randn(WIDTH, K * HIDDEN, dtype=DTYPE) * 0.02
        self.nbytes = self.up.nbytes + self.down.nbytes

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.up).chunk(2, dim=-1)
        return F.linear(F.silu(gate).mul_(up), self.down)


def measure(
    layers: dict[int, list[Block]], dense: list[Dense], tokens: int, rounds: int
) -> tuple[Times, dict[tuple[int, str], str], list[Case]]:
    """All layers and the dense network in turn; the second are the reasons why some are left out."""
    cases = [Case(blocks, tokens) for blocks in layers.values()]
    x = cases[0].x
    networks = {(1, "dense"): lambda turn: dense[turn % len(dense)](x)}
    ways, left_out = {}, {}
    if reason := ALLOWANCE.refuse(cases[0].flops, torch_rate(DTYPE), PASSES):
        left_out[1, "dense"], networks = reason, {}
    elif milliseconds(lambda: dense[0](x)) < PATIENCE:
        for network in dense[1:]:
            network(x)
    for case in cases:
        found, others = timers(case)
        ways |= {(case.num_experts, name): timer for name, timer in found.items()}
        left_out |= {(case.num_experts, name): reason for name, reason in others.items()}
    return in_turn(ways | timed(networks), rounds), left_out, cases


def rows_of(times: Times, left_out: dict[tuple[int, str], str], limits_ms: dict[int, float]) -> list[dict[str, str]]:
    """One row per number of experts and implementation; ratios are taken round by round.

    Args:
        times: milliseconds of every round.
        left_out: why others have none.
        limits_ms: milliseconds at best, by number of experts.
    """
    fewest = min(num_experts for num_experts in limits_ms if num_experts > 1)
    rows = []
    for (num_experts, name), values in times.items():
        row = {"experts": str(num_experts), "implementation": name}
        row |= summary(("median_ms", "quartiles_ms"), values)
        if (1, "dense") in times:
            row |= summary(("times_dense", "times_dense_quartiles"), ratios(values, times[1, "dense"]), ".3f")
        if num_experts > 1:
            row |= speedup({key: t for key, t in times.items() if key[0] == num_experts and is_peer(key[1])}, values)
        if num_experts > 1 and (fewest, name) in times:
            row |= summary(("times_fewest", "times_fewest_quartiles"), ratios(values, times[fewest, name]), ".3f")
        share = limits_ms[num_experts] / quartiles(values)[1]
        rows.append(row | {"limit_ms": f"{limits_ms[num_experts]:.4g}", "share_of_limit": f"{share:.3f}"})
    return rows + [
        {"experts": str(num_experts), "implementation": name, "quartiles_ms": reason}
        for (num_experts, name), reason in left_out.items()
    ]


def main() -> None:
    options = parser(__doc__, rounds=15, file="scaling-cpu.csv", picture="cpu-scaling.png")
    options.add_argument("--experts", nargs="+", type=int, default=[8, 16, 32, 64, 128])
    options.add_argument("--tokens", nargs="+", type=int, default=[1, 64, 1024, 4096])
    chosen = options.parse_args()
    begin = start(chosen) | {"dtype": str(DTYPE).removeprefix("torch.")}
    layers, dense = {}, []
    for what in points(chosen, begin, [{"tokens": str(tokens)} for tokens in chosen.tokens]):
        layers = layers or {num_experts: blocks_of(sizes(num_experts), DTYPE) for num_experts in chosen.experts}
        dense = dense or [Dense() for _ in range(SETS)]
        times, left_out, cases = measure(layers, dense, int(what["tokens"]), chosen.rounds)
        limits_ms = {case.num_experts: case.limit("moeify") for case in cases}
        limits_ms[1] = at_best(dense[0].nbytes, cases[0].flops, DTYPE)
        report(chosen.out, FIELDS, [begin | what | row for row in rows_of(times, left_out, limits_ms)])
    if chosen.out.exists():
        draw_scaling(latest(chosen.out, POINT), chosen.picture)


if __name__ == "__main__":
    main()
