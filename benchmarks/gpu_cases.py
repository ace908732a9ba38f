"""The layers that `benchmarks/gpu.py` runs, their goals, and the ways to compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from moeify.backends import find_backend
from moeify.experts import FFN
from moeify.kernels.stacked import SWIGLU, Activation, ClampedGlu, Plain
from moeify.routing import Assignment, assign

PEERS = {"transformers/grouped_mm": "P1", "transformers/batched_mm": "P1", "liger": "P2", "sonicmoe": "P3"}


@dataclass(frozen=True)
class Goal:
    """A layer and its goals.

    Attributes:
        forward: TFLOP/s of the forward pass.
        both: TFLOP/s of forward and backward pass.
        kept: bytes kept for the backward pass, over those of P1.
        over: how many times faster than a peer, forwards and backwards.
        microseconds: of the forward pass, of decoding.
    """

    name: str
    tokens: int
    width: int
    hidden: int
    experts: int
    k: int
    activation: Activation = SWIGLU
    bias: bool = False
    forward: float = 0
    both: float = 0
    kept: float = 0
    over: dict[str, float] = field(default_factory=dict)
    microseconds: float = 0

    @property
    def flops(self) -> int:
        """Of a forward pass."""
        return 2 * self.tokens * self.k * self.width * self.hidden * (self.activation.projections + 1)

    @property
    def shape(self) -> str:
        """Sizes, as rows of results name them."""
        return f"T{self.tokens} D{self.width} H{self.hidden} E{self.experts} K{self.k}"


QWEN = Goal("", 32768, 2048, 768, 128, 8)
GOALS = [
    replace(QWEN, name="G1", forward=450, both=380, kept=0.26, over={"P1": 1.3, "P2": 1.25}),
    replace(QWEN, name="G2", tokens=4096, forward=330, both=250, kept=0.26, over={"P2": 1.3}),
    Goal("G3", 24576, 1536, 256, 128, 8, forward=290, both=300, kept=0.18, over={"P3": 0.8}),
    Goal("G4", 32768, 2048, 1024, 64, 8, forward=470, both=400, kept=0.29, over={"P1": 1.2}),
    Goal("G5", 16384, 2880, 2880, 32, 4, ClampedGlu(), True, forward=450, both=380, kept=0.38, over={"P1": 1.1}),
    Goal("G6", 16384, 4096, 14336, 8, 2, kept=0.47, over={"P1": 0.97}),
    Goal("G7", 25088, 768, 3072, 32, 2, Plain(F.gelu), True, forward=350, both=300, kept=0.5, over={"P1": 1.5}),
    replace(QWEN, name="G8 T=1", tokens=1, microseconds=40, over={"P1": 2}),
    replace(QWEN, name="G8 T=8", tokens=8, microseconds=200, over={"P1": 2}),
    replace(QWEN, name="G8 T=32", tokens=32, microseconds=400),
]


class Case:
    """The inputs of a goal, and the ways to compute it."""

    def __init__(self, goal: Goal, device: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.goal, self.device = goal, device
        self.ffn = FFN(goal.experts, goal.width, goal.hidden, activation=goal.activation, bias=goal.bias).to(
            device, dtype
        )
        self.x = torch.randn(goal.tokens, goal.width, device=device, dtype=dtype)
        scores = torch.rand(goal.tokens, goal.experts, device=device).softmax(-1)
        self.gates, self.index = scores.topk(goal.k)
        self.routing = self.route()

    def route(self) -> Assignment:
        """The sort of the decision; ours is timed with it, as peers sort for themselves."""
        return assign(self.index, self.gates, self.goal.experts)

    def ways(self) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
        """The ways that serve the layer, and why others do not."""
        ours = ("decode", "triton") if self.goal.microseconds else ("triton",)
        names = [*ours, "gather", *PEERS]
        if not self.goal.microseconds:
            names.remove("transformers/batched_mm")  # which copies the weights for every row
        ways, refused = {}, {}
        for name in names:
            backend = find_backend(name)
            if reason := backend.refuse(self.x, self.routing, self.ffn):
                refused[name] = reason
            elif name in PEERS:
                ways[name] = lambda backend=backend: backend.run(self.x, self.routing, self.ffn)
            else:
                ways[name] = lambda backend=backend: backend.run(self.x, self.route(), self.ffn)
        return ways, refused

    def backward(self, way: Callable[[], Tensor]) -> None:
        """Forwards and backwards with fresh gradients."""
        way().backward(self.upstream)
        for leaf in (self.x, *self.ffn.parameters()):
            leaf.grad = None

    def train(self) -> None:
        """Ask for gradients of the tokens and all weights."""
        self.x.requires_grad_()
        self.gates.requires_grad_()
        self.routing = self.route()
        self.upstream = torch.randn_like(self.x)

    def kept(self, way: Callable[[], Tensor]) -> float:
        """MiB kept for the backward pass beside the weights."""
        seen = {p.untyped_storage().data_ptr() for p in self.ffn.parameters()}
        sizes = []

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                sizes.append(storage.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            way()
        return sum(sizes) / 2**20


def shrunk(goal: Goal) -> Goal:
    """The goal at a size that a CPU computes at once."""
    small = {"tokens": min(goal.tokens, 16), "width": goal.width // 32, "hidden": goal.hidden // 32}
    return replace(goal, **small, experts=min(goal.experts, 8), k=min(goal.k, 2))
