"""Shared modules, which read every token beside the routed experts: functions from the dense module to one, or None."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.find.dense import is_quantized
from moeify.registry import register


@register("shared", "nothing")
def nothing(dense: nn.Module, width: int) -> None:
    """No shared module."""
    return


@register("shared", "dense")
def dense(dense: nn.Module, width: int) -> nn.Module:
    """The dense network itself, trained on: a shared expert (DeepSeekMoE)."""
    return _in_its_memory(dense)


@register("shared", "frozen")
def frozen(dense: nn.Module, width: int) -> nn.Module:
    """The dense network as it is, not trained: the experts learn what to add to it."""
    return _in_its_memory(dense).requires_grad_(False)


@register("shared", "gated")
def gated(dense: nn.Module, width: int) -> nn.Module:
    """The dense network times a learned sigmoid gate per token (Qwen2-MoE)."""
    weight = next(dense.parameters())
    return GatedShared(_in_its_memory(dense), width).to(weight.device, weight.dtype)


@register("shared", "bias")
def bias(dense: nn.Module, width: int) -> nn.Module:
    """A learned vector that every token gets, 0 at first (JetMoE)."""
    weight, out = next(dense.parameters()), getattr(dense, "width_out", width)
    return Bias(out if isinstance(out, int) else width).to(weight.device, weight.dtype)


class Bias(nn.Module):
    """The same vector for every token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... O"]:
        """Give every token the vector."""
        return x.new_zeros(*x.shape[:-1], 1) + self.bias


def _in_its_memory(dense: nn.Module) -> nn.Module:
    """A copy whose parameters are its own, but share the memory of the dense network that it replaces.

    Quantised modules, whose parameters may be of classes of their own, are taken as they are.
    """
    if any(is_quantized(part) for part in dense.modules()):
        return dense
    own = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in dense.parameters()}
    return copy.deepcopy(dense, own)


class GatedShared(nn.Module):
    """`sigmoid(w · x) · dense(x)`."""

    def __init__(self, dense: nn.Module, width: int) -> None:
        super().__init__()
        self.dense = dense
        self.gate = nn.Linear(width, 1, bias=False)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... O"]:
        """Gate the dense network's output."""
        return torch.sigmoid(self.gate(x)) * self.dense(x)
