"""Time one sparse layer side by side with transformers' implementations of the same experts, and those of engines.

Every implementation runs the same weights on the same decisions, in turn within one process (A B C A B C ...), and is
checked against the definition first. kt-kernel, ONNX Runtime and OpenVINO take part where they are installed. Rows are
appended to `benchmarks/results/layer-<device>.csv`.

    python benchmarks/run.py                        the table of this machine
    python benchmarks/run.py --blocks tiny --tokens 256 --backward
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import torch
import transformers
from allowance import ALLOWANCE, LEFT_OUT, torch_rate
from graph_layer import ENGINES, GraphLayer, export, why_not
from kt_layer import IS_INSTALLED, KtLayer
from measure import (
    HEAD,
    RESULTS,
    at_best,
    hardware,
    in_turn,
    parser,
    points,
    quartiles,
    report,
    speedup,
    start,
    summary,
    timed,
)
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moeify.backends import compose, run
from moeify.experts import FFN, Experts
from moeify.experts.quantized import quantize
from moeify.kernels.cpu.packing import pack
from moeify.routing import assign

Sizes = tuple[int, int, int, int]
"""Width, hidden, experts, k."""

BLOCKS: dict[str, Sizes] = {
    "tiny": (256, 512, 8, 2),
    "fine-grained": (1024, 512, 64, 8),
    "mixtral-like": (1024, 3584, 8, 2),
}
COLD = 2**28  # bytes of weights that take turns: more than the caches hold
HOPELESS, PATIENCE = 10, 1000  # a peer that takes so many times as long as another, and so many ms, is not waited for
KT = "kt-kernel"
PASSES = 3  # of a peer: its check, its first time and one round
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FIELDS = [
    *HEAD, "block", "dtype", "tokens", "pass", "implementation", "median_ms", "quartiles_ms",
    "speedup_over_best_peer", "speedup_quartiles", "limit_ms", "share_of_limit",
]  # fmt: skip


class Block:
    """One set of weights, in the experts of transformers and in ours, which share them, and rounded."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: str, bits: Sequence[int]) -> None:
        width, hidden, num_experts, k = self.sizes = sizes
        config = transformers.MixtralConfig(
            hidden_size=width, intermediate_size=hidden, num_local_experts=num_experts, num_experts_per_tok=k
        )
        config._experts_implementation = "eager"
        self.hf = MixtralExperts(config).to(device, dtype)
        for weight in self.hf.parameters():
            nn.init.normal_(weight, std=0.02)
        with torch.device("meta"):
            self.ours, self.packed = (FFN(num_experts, width, hidden) for _ in range(2))
        for each in (self.ours, self.packed):
            each.gate_up_proj, each.down_proj = self.hf.gate_up_proj, self.hf.down_proj
        pack(self.packed)  # `ours` may not be packed
        self.rounded = {f"moeify/int{each}": quantize(self.ours, each) for each in bits}
        self.exported: dict[str, tempfile.TemporaryDirectory[str]] = {}
        self.graphs: dict[str, GraphLayer] = {}

    @cached_property
    def kt(self) -> KtLayer:
        """The same weights, copied into kt-kernel."""
        return KtLayer(self.ours, self.sizes[3])

    def graph(self, engine: str, like: Block) -> GraphLayer:
        """The graph of another block's experts, copied: to export each set of weights would take minutes."""
        if engine not in self.graphs:
            if engine not in like.exported:
                like.exported[engine] = export(engine, like.hf, like.sizes[3])
            self.graphs[engine] = GraphLayer(engine, Path(like.exported[engine].name), like.hf.down_proj.dtype)
        return self.graphs[engine]


def blocks_of(sizes: Sizes, dtype: torch.dtype, device: str = "cpu", bits: Sequence[int] = ()) -> list[Block]:
    """Sets of weights that take turns, as the layers of a model do, so that none is found in a cache."""
    width, hidden, num_experts, _ = sizes
    torch.manual_seed(0)
    sets = max(2, min(24, COLD // (num_experts * 3 * width * hidden * dtype.itemsize)))
    return [Block(sizes, dtype, device, bits) for _ in range(sets)]


class Case:
    """Some blocks at one number of tokens: inputs, decisions, and the ways to compute them."""

    def __init__(self, blocks: list[Block], tokens: int, *, backward: bool = False) -> None:
        width, hidden, self.num_experts, self.k = blocks[0].sizes
        like = blocks[0].hf.down_proj
        self.dtype, self.device = like.dtype, like.device.type
        torch.manual_seed(0)
        self.x = torch.randn(tokens, width, device=self.device, dtype=self.dtype, requires_grad=backward)
        gates, self.index = torch.randn(tokens, self.num_experts, device=self.device).softmax(-1).topk(self.k)
        self.gates = (gates / gates.sum(-1, keepdim=True)).to(self.dtype)
        self.flops = 6 * tokens * self.k * width * hidden * (3 if backward else 1)
        self.read = len(self.index.unique()) * 3 * width * hidden * (3 if backward else 1)  # weights, in numbers
        self.blocks, self.backward = blocks, backward

    def ways(self) -> dict[str, Callable[[Block], Tensor]]:
        """Implementations by name; ours includes the sort, as theirs do."""
        theirs = [name for name in ("grouped_mm", "batched_mm") if name != "batched_mm" or len(self.x) <= 16]
        ours = {}
        if self.device == "cpu" and not self.backward:
            for name in self.blocks[0].rounded:
                ours[name] = lambda block, name=name: self.compute(block.rounded[name])
            ours["moeify/packed"] = lambda block: self.compute(block.packed)
        return {
            "transformers/eager": lambda block: block.hf(self.x, self.index, self.gates),
            **{
                f"transformers/{name}": lambda block, name=name: ALL_EXPERTS_FUNCTIONS[name](
                    block.hf, self.x, self.index, self.gates
                )
                for name in theirs
            },
            **({KT: lambda block: block.kt(self.x, self.index, self.gates)} if self.fits_kt and IS_INSTALLED else {}),
            **{
                engine: lambda block, engine=engine: block.graph(engine, self.blocks[0])(self.x, self.index, self.gates)
                for engine, reason in self.engines.items()
                if reason is None
            },
            "moeify": lambda block: self.compute(block.ours),
            **ours,
        }

    @property
    def fits_kt(self) -> bool:
        """Whether kt-kernel can compute it."""
        return self.device == "cpu" and self.dtype == torch.bfloat16 and not self.backward

    @property
    def engines(self) -> dict[str, str | None]:
        """The engines that run graphs, each with the reason why it is left out, None where it is not."""
        fits = self.device == "cpu" and not self.backward
        return {engine: why_not(engine, self.dtype) for engine in ENGINES} if fits else {}

    def compute(self, experts: Experts, backend: str = "auto") -> Tensor:
        """Our layer: the decision is sorted, and the experts run."""
        return run(backend, self.x, assign(self.index, self.gates, self.num_experts), experts)

    @torch.no_grad()
    def reference(self, way: str) -> Tensor:
        """The definition in fp32, of the rounded weights where they are rounded."""
        if way not in self.blocks[0].rounded:
            return self._reference
        return compose(
            self.x.float(), assign(self.index, self.gates.float(), self.num_experts), self.blocks[0].rounded[way]
        )

    @cached_property
    def _reference(self) -> Tensor:
        experts = copy.deepcopy(self.blocks[0].ours).float()
        return compose(self.x.float(), assign(self.index, self.gates.float(), self.num_experts), experts)

    def limit(self, way: str) -> float:
        """Milliseconds in which the memory could be read, or the products computed, at best."""
        each = {"moeify/int8": 1.0, "moeify/int4": 0.5 + 4 / 64}.get(way, self.dtype.itemsize)  # 4 bits have scales
        return at_best(self.read * each, self.flops, self.dtype, self.device)

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
        for weight in block.hf.parameters():
            weight.grad = None


def timers(case: Case) -> tuple[dict[str, Callable[[int], float]], dict[str, str]]:
    """What times the implementations, which agree with the definition and have passed all weights once.

    Peers are left out for which there is not the time, and those that take seconds and many times as long as another: a
    full gradient per expert does that. A slow peer does not pass all weights.

    Returns:
        The timers, and the reasons why others are left out.

    Raises:
        RuntimeError: an implementation does not agree.
    """
    found = timed({name: partial(case.step, way) for name, way in case.ways().items()}, case.device)
    first: dict[str, float] = {}
    left_out: dict[str, str] = {}
    if case.fits_kt and not IS_INSTALLED:
        left_out[KT] = f"{LEFT_OUT}not installed"
    left_out |= {engine: reason for engine, reason in case.engines.items() if reason}
    for name, way in case.ways().items():
        if name in (KT, *ENGINES):
            for block in case.blocks:
                way(block)  # copies the weights
        elif is_peer(name) and case.device == "cpu":
            reason = ALLOWANCE.refuse(case.flops, torch_rate(case.dtype, case.backward), PASSES)
            if reason:
                left_out[name] = reason
                continue
        with torch.no_grad():
            reference = case.reference(name)
            error = (way(case.blocks[0]).float() - reference).abs().max().item()
        allowed = 64 * torch.finfo(case.x.dtype).eps * reference.abs().max().item()
        if error > allowed:
            raise RuntimeError(f"{name} differs from the definition by {error:.3g} (allowed {allowed:.3g})")
        first[name] = found[name](0)
    peers = {name: time for name, time in first.items() if is_peer(name)}
    for name, time in peers.items():
        if time > max(PATIENCE, HOPELESS * min(peers.values())):
            left_out[name] = f"{LEFT_OUT}{time:.0f} ms is more than {HOPELESS} times what another peer takes"
    found = {name: timer for name, timer in found.items() if name not in left_out}
    for name, timer in found.items():
        if not (is_peer(name) and first[name] > PATIENCE):
            for turn in range(1, len(case.blocks)):
                timer(turn)
    return found, left_out


def is_peer(name: str) -> bool:
    """Whether an implementation is not ours."""
    return name.startswith(("transformers", KT, *ENGINES))


def rows_of(
    times: dict[str, list[float]], left_out: dict[str, str], limit: Callable[[str], float]
) -> list[dict[str, str]]:
    """One row per implementation; the speed-up is over the peer with the lowest median, round by round.

    Args:
        times: milliseconds by implementation.
        left_out: why others have none.
        limit: milliseconds that an implementation needs at least.
    """
    peers = {name: values for name, values in times.items() if is_peer(name)}
    return [
        {"implementation": name}
        | summary(("median_ms", "quartiles_ms"), values)
        | speedup(peers, values)
        | {"limit_ms": f"{limit(name):.4g}", "share_of_limit": f"{limit(name) / quartiles(values)[1]:.3f}"}
        for name, values in times.items()
    ] + [{"implementation": name, "quartiles_ms": reason} for name, reason in left_out.items()]


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    options.add_argument("--blocks", nargs="+", default=list(BLOCKS), choices=list(BLOCKS))
    options.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    options.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 1024])
    options.add_argument("--backward", action=argparse.BooleanOptionalAction, default=None, help="default: both")
    chosen = options.parse_args()
    begin = start(chosen, hardware(chosen.device))
    chosen.out = chosen.out or RESULTS / f"layer-{chosen.device}.csv"
    passes = [False, True] if chosen.backward is None else [chosen.backward]
    bits = (8, 4) if chosen.device == "cpu" and False in passes else ()
    names = {False: "forward", True: "forward+backward"}
    wanted = [
        {"block": block, "dtype": dtype, "tokens": str(tokens), "pass": names[backward]}
        for backward in passes
        for block in chosen.blocks
        for dtype in chosen.dtypes
        for tokens in chosen.tokens
    ]
    blocks, made = [], None
    for what in points(chosen, begin, wanted):
        if (which := (what["block"], what["dtype"])) != made:
            blocks, made = blocks_of(BLOCKS[which[0]], DTYPES[which[1]], chosen.device, bits), which
        case = Case(blocks, int(what["tokens"]), backward=what["pass"] == names[True])
        found, left_out = timers(case)
        rows = rows_of(in_turn(found, chosen.rounds), left_out, case.limit)
        report(chosen.out, FIELDS, [begin | what | row for row in rows])


if __name__ == "__main__":
    main()
