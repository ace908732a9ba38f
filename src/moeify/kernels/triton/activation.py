"""The activation of an expert and its derivative in Triton, in fp32."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from moeify.kernels.stacked import KNOWN, Activation, ClampedGlu, Glu, Plain, name_of


@dataclass(frozen=True)
class KernelActivation:
    """An activation as arguments of the Triton kernels.

    Attributes:
        act: the name of the activation, or "clamped".
        gated: whether it has a gate and an up projection as inputs.
        alpha: of "clamped", see `moeify.kernels.stacked.ClampedGlu`.
        limit: of "clamped".
    """

    act: str
    gated: bool
    alpha: float = 0.0
    limit: float = 0.0


def kernel_activation(activation: Activation) -> KernelActivation:
    """The activation of experts as arguments of the Triton kernels.

    Raises:
        ValueError: an activation that no kernel supports.
    """
    if isinstance(activation, ClampedGlu):
        return KernelActivation("clamped", True, activation.alpha, activation.limit)
    act = name_of(activation.act) if isinstance(activation, Plain | Glu) else None
    if act is None:
        raise ValueError(f"no kernel knows the activation {activation}; known are {', '.join(KNOWN)}")
    return KernelActivation(act, activation.projections == 2)


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The value and the derivative of the activation at x."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        y = x * s
        slope = s * (1 + x * (1 - s))
    elif ACT == "gelu":
        phi = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        y = x * phi
        slope = phi + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(u / 2)) / 2 is sigmoid(u)
        y = x * s
        slope = s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACT == "relu":
        y = tl.maximum(x, 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    else:
        tl.static_assert(ACT == "relu2")
        r = tl.maximum(x, 0.0)
        y = r * r
        slope = 2 * r
    return y, slope


@triton.jit
def gated(gate, up, alpha, limit, ACT: tl.constexpr):
    """The gated activation, and its partial derivatives with respect to gate and up."""
    if ACT == "clamped":
        g = tl.minimum(gate, limit)
        u = tl.minimum(tl.maximum(up, -limit), limit)
        s = tl.sigmoid(alpha * g)
        y = (u + 1) * g * s
        by_gate = tl.where(gate <= limit, (u + 1) * s * (1 + alpha * g * (1 - s)), 0.0)
        by_up = tl.where((up >= -limit) & (up <= limit), g * s, 0.0)
    else:
        a, slope = activate(gate, ACT)
        y = a * up
        by_gate = slope * up
        by_up = a
    return y, by_gate, by_up
