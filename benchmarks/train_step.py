"""Time whole training steps of a small language model: forward, cross entropy, backward, AdamW, fresh gradients.

A Mixtral of 52 M parameters, 19 M of them active, is trained on 2,048 tokens by transformers' implementations of its
experts and by ours, and beside it the dense model of equal active size; in fp32, in bf16, and in fp32 under autocast
to bf16. All take turns within one process, the sparse ones on the same weights, and their gradients of one sequence are
compared first. What a step spends on experts (with their router), attention, optimizer and the rest is measured in
steps of its own. Where products are so slow that there is no time for a contender, its row says so. The limit is that
of the products, without attention's scores.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --modes bf16 --rounds 1 --out /tmp/train.csv
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from allowance import ALLOWANCE, torch_rate
from measure import HEAD, at_best, in_turn, limits, parser, points, quartiles, report, speedup, start, summary, timed
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.flops import Count, count
from moeify.hf.interface import use_moeify_experts

HIDDEN, K = 896, 2
SHAPE = {
    "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8,
    "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "sparse": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SHAPE, intermediate_size=HIDDEN, num_local_experts=8, num_experts_per_tok=K)
    ),
    "dense": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, intermediate_size=K * HIDDEN)),
}
SEQUENCES, LENGTH = 8, 256
MODES = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "autocast": (torch.float32, True)}
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1, "autocast": 0.1}  # of gradients; rounding to bf16 moves some tokens elsewhere
PASSES = 4  # of a contender: its check, a step to warm up, one round, and one taken apart
PARTS = ("experts", "attention", "optimizer", "rest")
FIELDS = [
    *HEAD, "mode", "model", "implementation", "tokens", "median_ms", "quartiles_ms", "tok_per_s",
    "speedup_over_best_peer", "speedup_quartiles", "limit_ms", "share_of_limit", *(f"{part}_share" for part in PARTS),
]  # fmt: skip

Name = tuple[str, str]
"""A model and what computes its experts."""


class Training:
    """A model, its optimizer, and a step over always the same tokens."""

    def __init__(self, model: nn.Module, autocast: bool) -> None:
        self.model, self.autocast = model, autocast
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        self.ids = torch.randint(SHAPE["vocab_size"], (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))

    def differentiate(self, sequences: int = SEQUENCES) -> None:
        """Forward, cross entropy, backward."""
        ids = self.ids[:sequences]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            logits = self.model(ids, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()

    def update(self) -> None:
        """The optimizer's part."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, implementation: str | None, turn: int = 0) -> None:
        """All of it, with the experts computed by one of the implementations."""
        self.choose(implementation)
        self.differentiate()
        self.update()

    def choose(self, implementation: str | None) -> None:
        """Say what computes the experts; None in a dense model."""
        if implementation is not None:
            self.model.set_experts_implementation(implementation)

    def gradient(self, implementation: str) -> Tensor:
        """Of all parameters, on the first sequence."""
        self.choose(implementation)
        self.differentiate(1)
        found = torch.cat([parameter.grad.float().flatten() for parameter in self.model.parameters()])
        self.optimizer.zero_grad()
        return found


class Clock:
    """Seconds spent in modules, forwards and backwards, by the name of their part."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self.begun = 0.0

    def watch(self, part: str, module: nn.Module) -> list[Any]:
        """Time a module from now on; its input must be read by nobody else."""
        return [
            module.register_forward_pre_hook(partial(self._enter, part), with_kwargs=True),
            module.register_forward_hook(partial(self._leave, part)),
        ]

    def _enter(self, part: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        x = next(value for value in (*args, kwargs.get("hidden_states")) if isinstance(value, Tensor))
        x.register_hook(partial(self.end, part))
        self.begin()

    def _leave(self, part: str, module: nn.Module, args: tuple, output: Any) -> None:
        self.end(part)
        y = output[0] if isinstance(output, tuple) else output
        y.register_hook(self.begin)

    def begin(self, *gradient: Tensor) -> None:
        """A part begins; also called as a hook of the gradient of what it gives."""
        self.begun = time.perf_counter()

    def end(self, part: str, *gradient: Tensor) -> None:
        """It ends; also called as a hook of the gradient of what it reads."""
        self.spent[part] += time.perf_counter() - self.begun


def shares(training: Training, implementation: str | None, repeats: int) -> dict[str, float]:
    """What part of some steps goes where."""
    training.choose(implementation)
    clock = Clock()
    layers = training.model.model.layers
    handles = [
        handle
        for layer in layers
        for part, module in (("experts", layer.mlp), ("attention", layer.self_attn))
        for handle in clock.watch(part, module)
    ]
    begun = time.perf_counter()
    for _ in range(repeats):
        training.differentiate()
        clock.begin()
        training.update()
        clock.end("optimizer")
    total = time.perf_counter() - begun
    for handle in handles:
        handle.remove()
    clock.spent["rest"] = total - sum(clock.spent.values())
    return {part: clock.spent[part] / total for part in PARTS}


def contenders(mode: str) -> tuple[dict[Name, tuple[Training, str | None]], dict[Name, str]]:
    """Who is trained, and by which implementation; and the reasons why others are left out.

    Raises:
        RuntimeError: the gradients of two implementations differ.
    """
    dtype, autocast = MODES[mode]
    trainings = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        trainings[name] = Training(make().to(dtype), autocast)
    sparse = trainings["sparse"]
    use_moeify_experts(sparse.model)  # from now on known by name
    found: dict[Name, tuple[Training, str | None]] = {("sparse", "moeify"): (sparse, "moeify")}
    found |= {("sparse", f"transformers/{name}"): (sparse, name) for name in ("eager", "grouped_mm")}
    found |= {("dense", "transformers"): (trainings["dense"], None)}
    refused = {name: refusal(name, count(training.model), mode) for name, (training, _) in found.items()}
    left_out = {name: reason for name, reason in refused.items() if reason}
    found = {name: contender for name, contender in found.items() if name not in left_out}
    for implementation in [each for _, each in found.values() if each in ("grouped_mm", "moeify")]:
        reference = sparse.gradient("eager")
        error = ((sparse.gradient(implementation) - reference).norm() / reference.norm()).item()
        if not error <= TOLERANCE[mode]:
            raise RuntimeError(f"the gradient by {implementation} in {mode} differs from that by eager by {error:.2g}")
    return found, left_out


def refusal(name: Name, counted: Count, mode: str) -> str | None:
    """Why there is no time for a contender, by the products of its step; None if there is."""
    dtype = torch.bfloat16 if MODES[mode][1] else MODES[mode][0]
    flops, experts = SEQUENCES * LENGTH * counted.training_flops, 0.0
    if name == ("sparse", "moeify"):
        experts = 18.0 * SEQUENCES * LENGTH * K * SHAPE["hidden_size"] * HIDDEN * SHAPE["num_hidden_layers"]
    rate = torch_rate(dtype, backward=True)
    at_torch = flops - experts + experts * rate / max(rate, limits(dtype)[1])  # FLOPs that take torch as long
    return ALLOWANCE.refuse(at_torch, rate, PASSES)


def rows_of(
    times: dict[Name, list[float]],
    left_out: dict[Name, str],
    split: dict[Name, dict[str, float]],
    limits_ms: dict[str, float],
) -> list[dict[str, str]]:
    """One row per contender; the speed-up is over the best of transformers' ways to train the sparse model.

    Args:
        times: milliseconds of every round.
        left_out: why others have none.
        split: shares of a step by part.
        limits_ms: milliseconds at best, by model.
    """
    peers = {name: t for name, t in times.items() if name[0] == "sparse" and "transformers" in name[1]}
    tokens = SEQUENCES * LENGTH
    return [
        {"model": name[0], "implementation": name[1], "tokens": str(tokens)}
        | summary(("median_ms", "quartiles_ms"), values)
        | {"tok_per_s": f"{1000 * tokens / quartiles(values)[1]:.4g}"}
        | speedup(peers, values)
        | {
            "limit_ms": f"{limits_ms[name[0]]:.4g}",
            "share_of_limit": f"{limits_ms[name[0]] / quartiles(values)[1]:.3f}",
        }
        | {f"{part}_share": f"{split[name][part]:.3f}" for part in PARTS}
        for name, values in times.items()
    ] + [
        {"model": name[0], "implementation": name[1], "tokens": str(tokens), "quartiles_ms": reason}
        for name, reason in left_out.items()
    ]


def main() -> None:
    options = parser(__doc__, rounds=7, file="train-cpu.csv")
    options.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    chosen = options.parse_args()
    begin = start(chosen)
    for what in points(chosen, begin, [{"mode": mode} for mode in chosen.modes]):
        mode = what["mode"]
        dtype, autocast = MODES[mode]
        found, left_out = contenders(mode)
        for training, implementation in found.values():
            training.step(implementation)
        ways = {name: partial(training.step, implementation) for name, (training, implementation) in found.items()}
        times = in_turn(timed(ways), chosen.rounds)
        repeats = 1 if ALLOWANCE.is_late else 2
        split = {name: shares(training, implementation, repeats) for name, (training, implementation) in found.items()}
        multiplied = torch.bfloat16 if autocast else dtype
        limits_ms = {
            name: at_best(0, count(training.model).training_flops * SEQUENCES * LENGTH, multiplied)
            for (name, _), (training, _) in found.items()
        }
        report(chosen.out, FIELDS, [begin | what | row for row in rows_of(times, left_out, split, limits_ms)])


if __name__ == "__main__":
    main()
