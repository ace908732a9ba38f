"""Modules that run after a block that contains a sparse layer: functions from the dense module to one, or None."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.find.dense import DenseFFN, matrix
from moeify.registry import register
from moeify.sparsify.make import draw
from moeify.sparsify.shared import nothing

register("after", "nothing")(nothing)


@register("after", "sandwich")
@torch.no_grad()
def sandwich(dense: nn.Module, width: int, *, variance: float | None = None, zero: bool = False) -> nn.Module:
    """A further dense network right behind every sparse one, with a norm and residual of its own (ST-MoE, 2202.08906).

    It has the dense network's architecture and is newly initialised, as `fresh` experts are.

    Args:
        dense: a `DenseFFN` with outputs as wide as its inputs.
        width: D.
        variance: as of `fresh`.
        zero: start with a down projection of zeros, so that the model starts as it is without.

    Raises:
        ValueError: the module is no `DenseFFN`, or O is not D.
    """
    if not isinstance(dense, DenseFFN) or dense.width != dense.width_out:
        raise ValueError(
            "the dense network behind the layer is added to its own input, so a feed-forward network whose outputs are "
            "as wide as its inputs is needed; use after=nothing"
        )
    ffn = copy.deepcopy(dense)
    for linear in (*ffn.ups, ffn.down):
        draw(matrix(linear), matrix(linear), variance)
        if (bias := linear._parameters["bias"]) is not None:
            bias.zero_()
    if zero:
        matrix(ffn.down).zero_()
    return Sublayer(ffn, width).to(dense.down_weight.device, dense.down_weight.dtype)


class Sublayer(nn.Module):
    """`x + ffn(norm(x))`, with the RMS norm of T5."""

    def __init__(self, ffn: nn.Module, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.ffn = ffn

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """Add the network's output to the residual stream."""
        return x + self.ffn(self.norm(x))


def append(layer: nn.Module, following: nn.Module) -> list[Callable[[], None]]:
    """Let a module read a layer's output before the next layer does, and return what removes it again."""
    layer.add_module("after", following)
    return [lambda: delattr(layer, "after"), layer.register_forward_hook(_continue).remove]


def _continue(layer: nn.Module, args: Any, output: Any) -> Any:
    """Layers return the hidden states, or a tuple that begins with them."""
    following = layer.get_submodule("after")
    return following(output) if isinstance(output, Tensor) else (following(output[0]), *output[1:])
