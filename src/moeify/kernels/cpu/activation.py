"""The activation between two projections on a CPU and its gradient: in C++ where the kernels have it, else by torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.kernels.cpu import cpp
from moeify.kernels.cpu.cpp.between import activate, differentiate
from moeify.kernels.stacked import Activation, Glu, Plain, name_of

Pullback = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From the gradient by the scaled hidden units, (R, H), and the scale of each row, (R): the gradients by the inputs of
the activation, (R, M), and by the scale, (R)."""

WORTH_COMPILING = 2**16
"""Number of inputs from which on the C++ kernels are compiled and used."""


def hidden_units(before: Float[Tensor, "R M"], activation: Activation) -> Float[Tensor, "R H"]:
    """`activation(before)`, without a graph.

    Args:
        before: contiguous.
        activation: the activation.
    """
    words = _words(before, activation)
    return activation(before) if words is None else activate(before, *words)


def with_pullback(before: Float[Tensor, "R M"], activation: Activation) -> tuple[Float[Tensor, "R H"], Pullback]:
    """`activation(before)`, and how gradients go back through it.

    Args:
        before: contiguous.
        activation: the activation.
    """
    if words := _words(before, activation):
        return activate(before, *words), lambda gradient, scale: differentiate(before, gradient, scale.float(), *words)
    with torch.enable_grad():
        inputs = before.detach().requires_grad_()
        hidden = activation(inputs)
    return hidden.detach(), partial(_back, inputs, hidden)


def _back(inputs: Tensor, hidden: Tensor, gradient: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    (by_inputs,) = torch.autograd.grad(hidden, inputs, gradient * scale.to(gradient.dtype).unsqueeze(1))
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return by_inputs, (gradient * hidden.detach()).sum(-1, dtype=wide)


def _words(before: Tensor, activation: Activation) -> tuple[str, str] | None:
    """Gating and activation as the C++ kernels name them, None where they are not used."""
    if not isinstance(activation, Plain | Glu) or (name := name_of(activation.act)) is None:
        return None
    if before.numel() < WORTH_COMPILING or before.dtype not in (torch.float32, torch.bfloat16) or not before.is_cpu:
        return None
    if cpp.why_not() is not None:
        return None
    return ("glu" if isinstance(activation, Glu) else "plain"), name
