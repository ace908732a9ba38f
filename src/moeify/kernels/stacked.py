"""`Stacked`, the stacked weights and the activation of E feed-forward experts, the input of fused kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moeify.kernels.constant import constant_result
from moeify.registry import register

Elementwise = Callable[[Tensor], Tensor]


@register("activation", "plain")
@dataclass(frozen=True)
class Plain:
    """`act(up)`: the activation of an FFN with an up and a down projection."""

    act: Elementwise
    projections = 1

    def __call__(self, up: Float[Tensor, "R H"]) -> Float[Tensor, "R H"]:
        """Apply the activation."""
        return self.act(up)

    def activated(self, up: Float[Tensor, "E M D"]) -> Float[Tensor, "E H D"]:
        """The part of the up projection that the activation is applied to: all of it."""
        return up


@dataclass(frozen=True)
class Glu:
    """`act(gate) · up`: a gated linear unit; SwiGLU for silu, GEGLU for gelu (Shazeer 2020)."""

    act: Elementwise
    projections = 2

    def __call__(self, gate_up: Float[Tensor, "R M"]) -> Float[Tensor, "R H"]:
        """Multiply the second half (up) by the activated first half (gate)."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act(gate) * up

    def activated(self, gate_up: Float[Tensor, "E M D"]) -> Float[Tensor, "E H D"]:
        """The part of the up projection that the activation is applied to: the first half."""
        return gate_up.chunk(2, dim=1)[0]


@register("activation", "clamped_glu")
@dataclass(frozen=True)
class ClampedGlu:
    """`(up + 1) · gate · sigmoid(alpha · gate)` with clamped parts, gate and up interleaved (GPT-OSS)."""

    alpha: float = 1.702
    limit: float = 7.0
    projections = 2

    def __call__(self, gate_up: Float[Tensor, "R M"]) -> Float[Tensor, "R H"]:
        """Compute the output from even columns (gate) and odd columns (up)."""
        gate = gate_up[..., ::2].clamp(max=self.limit)
        up = gate_up[..., 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)

    def activated(self, gate_up: Float[Tensor, "E M D"]) -> Float[Tensor, "E H D"]:
        """The part of the up projection that the activation is applied to: the even rows."""
        return gate_up[:, ::2]


@register("activation", "clamped_swiglu")
@dataclass(frozen=True)
class ClampedSwiGlu:
    """`silu(gate) · up` with clamped parts, gate and up side by side (DeepSeek-V4, GLM-5-Next, Step 3.5)."""

    limit: float = 10.0
    projections = 2

    def __call__(self, gate_up: Float[Tensor, "R M"]) -> Float[Tensor, "R H"]:
        """Compute the output from the first half (gate), clamped from above, and the second (up), from both sides."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)

    def activated(self, gate_up: Float[Tensor, "E M D"]) -> Float[Tensor, "E H D"]:
        """The part of the up projection that the activation is applied to: the first half."""
        return gate_up.chunk(2, dim=1)[0]


Activation = Plain | Glu | ClampedGlu | ClampedSwiGlu
SWIGLU = Glu(F.silu)


@dataclass(frozen=True)
class Stacked:
    """E feed-forward networks `down(activation(up(row)))` of one size.

    Attributes:
        up: the up projection; with a gated `activation`, gate and up projection as the activation arranges them.
        up_bias: bias of the up projection.
        down: the down projection.
        down_bias: bias of the down projection.
        activation: the activation between the projections.
    """

    up: Float[Tensor, "E M D"]
    up_bias: Float[Tensor, "E M"] | None
    down: Float[Tensor, "E O H"]
    down_bias: Float[Tensor, "E O"] | None
    activation: Activation


@register("act", "relu2")
def relu2(x: Tensor) -> Tensor:
    """max(x, 0)²."""
    return F.relu(x).square()


@register("act", "gelu")
def gelu(x: Tensor) -> Tensor:
    """x · Φ(x)."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU with the tanh approximation."""
    return F.gelu(x, approximate="tanh")


KNOWN: dict[str, Elementwise] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": gelu_tanh, "relu": F.relu, "relu2": relu2,
}  # fmt: skip
"""The elementwise activations that kernels support, by name."""


def unsupported_activation(activation: Activation) -> str | None:
    """The reason why no fused kernel supports an activation, None if they do."""
    if isinstance(activation, ClampedGlu) or (isinstance(activation, Plain | Glu) and name_of(activation.act)):
        return None
    return f"it supports the activations {', '.join(KNOWN)}, plain or gated, and not {activation}"


@constant_result
def name_of(act: Elementwise) -> str | None:
    """The name of an activation, recognised by its values; None for one that no kernel supports."""
    return _name_of(act)


@lru_cache(maxsize=64)
def _name_of(act: Elementwise) -> str | None:
    if isinstance(act, torch.nn.Module) and next(act.parameters(), None) is not None:
        return None
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    with torch.no_grad():
        y = act(x.clone())
    return next((name for name, known in KNOWN.items() if y.shape == x.shape and torch.allclose(known(x), y)), None)
