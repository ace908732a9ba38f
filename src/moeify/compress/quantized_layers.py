"""Modules with int8 or int4 weights that replace a model's linear layers and experts."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify import backends
from moeify.backends.base import waits_for_call
from moeify.experts.quantized import Quantized, Weights
from moeify.kernels.cpu import cpp
from moeify.kernels.cpu.cpp import steps
from moeify.routing import assign


class QuantizedLinear(nn.Module):
    """A linear layer with int8 weights (one scale per row) or int4 weights (one scale per group).

    Args:
        linear: the layer that it replaces.
        bits: 8 or 4.
        group_size: weights that share a scale, 32 or 64; used for 4 bits only.
    """

    def __init__(self, linear: nn.Linear, bits: int, group_size: int = 64) -> None:
        super().__init__()
        has_bias = linear.bias is not None
        with linear.weight.device:
            self.map = Weights(1, linear.out_features, linear.in_features, bits, group_size, has_bias)
        self.map.fill(linear.weight.unsqueeze(0), linear.bias.unsqueeze(0) if has_bias else None)
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... O"]:
        """`W x + bias`, computed by the C++ kernel where it is available."""
        if self._serves(x):
            rows = x.reshape(-1, self.in_features).float().contiguous()
            y = rows.new_empty(len(rows), self.out_features)
            bias = None if self.map.bias is None else self.map.bias.to(x.dtype)
            step = steps.linear(
                rows,
                y,
                self.map.weight,
                scales=self.map.scales,
                group_size=self.map.group_size,
                bias=bias,
                dtype=x.dtype,
            )
            steps.run_steps([step], len(rows))
            return y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        rows = x.reshape(-1, self.in_features)
        return self.map(rows, torch.tensor([len(rows)])).view(*x.shape[:-1], self.out_features)

    def _serves(self, x: Tensor) -> bool:
        """Whether the kernel supports this input."""
        return (
            x.dtype in (torch.float32, torch.bfloat16)
            and not x.requires_grad
            and not waits_for_call(self.map)
            and x.device == self.map.weight.device == torch.device("cpu")
            and cpp.why_not() is None
        )


class QuantizedExperts(nn.Module):
    """Quantised experts with the `forward` signature of the experts modules of transformers.

    Args:
        experts: the quantised experts.
    """

    def __init__(self, experts: Quantized) -> None:
        super().__init__()
        self.experts = experts

    def forward(
        self,
        hidden_states: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> Float[Tensor, "T D"]:
        """The weighted outputs of every token's experts."""
        routing = assign(top_k_index, top_k_weights, self.experts.num_experts)
        return backends.run("auto", hidden_states, routing, self.experts).to(hidden_states.dtype)
