"""Operands and steps of the decoding kernel: weights are read in place, norms and routers copied in fp32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.backends.cpp import step_experts
from moeify.compress.quantized_layers import QuantizedExperts, QuantizedLinear
from moeify.experts import Experts
from moeify.find.dense import DenseFFN
from moeify.hf.interface import HfExperts
from moeify.kernels.cpu.cpp import steps
from moeify.kernels.cpu.cpp.steps import Step
from moeify.kernels.stacked import Glu, name_of
from moeify.moe import MoE
from moeify.routers.topk import TopK
from moeify.serve.decoder import Layer, Linear, is_linear

Steps = list[Step | Callable[[], None]]
"""Steps of the kernel, and functions to call between them."""


@dataclass(frozen=True)
class Buffers:
    """Buffers (T, width) for activations between steps, by name; equal names and widths share memory."""

    tokens: int
    made: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def __call__(self, name: str, width: int) -> Float[Tensor, "T M"]:
        """The buffer of a name and width."""
        return self.made.setdefault((name, width), torch.empty(self.tokens, width, dtype=torch.float32, device="cpu"))


@dataclass(frozen=True)
class Norm:
    """RMSNorm, `y = x / rms(x) · gain`."""

    gain: Float[Tensor, "D"]
    eps: float

    def step(self, x: Float[Tensor, "T M"], y: Float[Tensor, "T M"]) -> Step:
        """The step from x to y."""
        return steps.norm(x, y, self.gain, self.eps)


@dataclass(frozen=True)
class Matrix:
    """`y = W x + bias`, or `y += W x + bias`, in `dtype`."""

    weight: Tensor
    bias: Float[Tensor, "1 O"] | None
    dtype: torch.dtype
    scales: Tensor | None = None
    group_size: int = 0

    @property
    def width_out(self) -> int:
        """O, the output width."""
        return self.weight.shape[1]

    def step(self, x: Float[Tensor, "T D"], y: Float[Tensor, "T O"], *, adds: bool = False) -> Step:
        """The step from x to y."""
        return steps.linear(
            x, y, self.weight, scales=self.scales, group_size=self.group_size, bias=self.bias, dtype=self.dtype,
            adds=adds,
        )  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """`o(attention(q, k, v of norm(x)))` with head dimension `head` and optional norms of queries and keys."""

    before: Norm
    projections: dict[str, Matrix]
    norms: dict[str, Norm]
    o: Matrix
    head: int
    scale: float

    def to_steps(self, x: Float[Tensor, "T D"], normed: Float[Tensor, "T D"], buffers: Buffers) -> Steps:
        """The steps that add the output of the attention to the residual stream x."""
        q, k, v = (buffers(letter, matrix.width_out) for letter, matrix in self.projections.items())
        attended = buffers("attended", q.shape[1])
        return [
            self.before.step(x, normed),
            *(matrix.step(normed, y) for matrix, y in zip(self.projections.values(), (q, k, v), strict=True)),
            *(self.norms[letter].step(y, y) for letter, y in (("q", q), ("k", k)) if letter in self.norms),
            *(steps.rotate(y, self.head) for y in (q, k)),
            steps.attend(q, k, v, attended, head=self.head, scale=self.scale, dtype=self.o.dtype),
            self.o.step(attended, x, adds=True),
        ]


class Network(ABC):
    """The dense or sparse FFN after the attention of a layer."""

    @abstractmethod
    def to_steps(self, normed: Float[Tensor, "T D"], x: Float[Tensor, "T D"], buffers: Buffers) -> Steps:
        """The steps that add the output for `normed` to the residual stream x."""


@dataclass(frozen=True)
class Gated(Network):
    """`down(act(gate(x)) · up(x))`."""

    gate: Matrix
    up: Matrix
    down: Matrix
    activation: str

    def to_steps(self, normed: Float[Tensor, "T D"], x: Float[Tensor, "T D"], buffers: Buffers) -> Steps:
        """The steps of gate and up projection, activation and down projection."""
        gate, up = (buffers(name, self.gate.width_out) for name in ("gate", "up"))
        return [
            self.gate.step(normed, gate),
            self.up.step(normed, up),
            steps.gated_activation(gate, up, gate, self.activation),
            self.down.step(gate, x, adds=True),
        ]


@dataclass(frozen=True)
class Sparse(Network):
    """Token-choice top-k routing in fp32, experts, and optionally a shared FFN; `choice` are the router's settings."""

    router: Matrix
    experts: steps.Experts
    choice: dict[str, Any]
    dtype: torch.dtype
    shared: Network | None

    def to_steps(self, normed: Float[Tensor, "T D"], x: Float[Tensor, "T D"], buffers: Buffers) -> Steps:
        """The steps of router logits, top-k selection and experts, and the shared FFN."""
        logits = buffers("router", self.router.width_out)
        chosen = steps.experts(normed, logits, x, self.experts, dtype=self.dtype, **self.choice)
        beside = [] if self.shared is None else self.shared.to_steps(normed, x, buffers)
        return [self.router.step(normed, logits), chosen, *beside]


@dataclass(frozen=True)
class Called(Network):
    """A module that the kernel does not support, which is called instead."""

    module: nn.Module
    dtype: torch.dtype

    def to_steps(self, normed: Float[Tensor, "T D"], x: Float[Tensor, "T D"], buffers: Buffers) -> Steps:
        """One function that calls the module."""
        return [partial(self._call, normed, x)]

    def _call(self, normed: Tensor, x: Tensor) -> None:
        x += self.module(normed.to(self.dtype).unsqueeze(1)).view_as(x)


def norm_of(norm: Any) -> Norm:
    """The operands of an RMSNorm of transformers."""
    return Norm(norm.weight.detach().float(), norm.variance_epsilon)


def matrix_of(linear: Linear, dtype: torch.dtype) -> Matrix:
    """The operands of a linear layer, quantised or not."""
    if isinstance(linear, QuantizedLinear):
        w = linear.map
        bias = None if w.bias is None else w.bias.to(dtype)
        return Matrix(w.weight, bias, dtype, w.scales, w.group_size)
    bias = None if linear.bias is None else linear.bias.detach().unsqueeze(0).to(dtype)
    return Matrix(linear.weight.detach().unsqueeze(0), bias, dtype)


def attention_of(layer: Layer, dtype: torch.dtype) -> Attention:
    """The operands of a layer's attention and the norm before it."""
    a = layer.attention
    norms = {letter: norm for letter in "qk" if (norm := getattr(a, f"{letter}_norm", None)) is not None}
    return Attention(
        norm_of(layer.before_attention),
        {letter: matrix_of(getattr(a, f"{letter}_proj"), dtype) for letter in "qkv"},
        {letter: norm_of(norm) for letter, norm in norms.items()},
        matrix_of(a.o_proj, dtype),
        a.head_dim,
        a.scaling,
    )


def network_of(mlp: nn.Module, dtype: torch.dtype) -> Network:
    """The operands of a layer's FFN: `Gated` or `Sparse` where the kernel supports it, else `Called`."""
    if (found := _ours(mlp) or _theirs(mlp)) is not None:
        experts, weight, bias, choice = found
        if (known := step_experts(experts, weight.shape[1], dtype)) is not None:
            bias = None if bias is None else bias.detach().float().unsqueeze(0)
            router = Matrix(weight.detach().float().unsqueeze(0).contiguous(), bias, torch.float32)
            shared = dict(mlp.named_children()).get("shared")
            beside = None if shared is None else _gated(shared, dtype) or Called(shared, dtype)
            return Sparse(router, known, choice, dtype, beside)
    return _gated(mlp, dtype) or Called(mlp, dtype)


_Choice = tuple[Experts, Tensor, Tensor | None, dict[str, Any]]
"""Experts, the router's weight and bias, and its settings."""


def _ours(moe: nn.Module) -> _Choice | None:
    """The parts of a `moeify.MoE` with token-choice top-k routing, None for any other module."""
    if not isinstance(moe, MoE) or moe.memory is not None:
        return None
    r = moe.router
    if type(r) is not TopK or r.per != "token" or r.expert_groups or r.score.__name__ not in steps.SCORES:
        return None
    choice = {
        "k": r.k, "score": r.score.__name__, "by_logit": r.select == "logit", "normalize": r.normalize,
        "scale": r.scale, "bias": None if r.selection_bias is None else r.selection_bias.float(),
    }  # fmt: skip
    return moe.experts, r.weight, r.bias, choice


def _theirs(block: Any) -> _Choice | None:
    """The parts of a sparse block of transformers with softmax and top-k only, None for any other module."""
    if set(dict(block.named_children())) != {"gate", "experts"} or not hasattr(block.gate, "top_k"):
        return None
    gate, experts = block.gate, block.experts
    if set(dict(gate.named_parameters())) != {"weight"} or list(gate.buffers()):
        return None
    choice = {
        "k": gate.top_k, "score": "softmax", "by_logit": False, "normalize": getattr(gate, "norm_topk_prob", True),
        "scale": 1.0, "bias": None,
    }  # fmt: skip
    inside = experts.experts if isinstance(experts, QuantizedExperts) else HfExperts(experts)
    return inside, gate.weight, None, choice


def _gated(mlp: Any, dtype: torch.dtype) -> Gated | None:
    """The operands of a gated FFN, of transformers or `DenseFFN`, None for any other module."""
    projections: list[Any]
    if isinstance(mlp, DenseFFN):
        projections, act = [*mlp.ups, mlp.down], mlp.activation.act if isinstance(mlp.activation, Glu) else None
    elif set(dict(mlp.named_children())) - {"act_fn"} == {"gate_proj", "up_proj", "down_proj"}:
        projections, act = [mlp.gate_proj, mlp.up_proj, mlp.down_proj], mlp.act_fn
    else:
        return None
    activation = None if act is None else name_of(act)
    linears = [module for module in projections if is_linear(module)]
    if activation is None or len(linears) != 3:
        return None
    gate, up, down = (matrix_of(linear, dtype) for linear in linears)
    return Gated(gate, up, down, activation)
