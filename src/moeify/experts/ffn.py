"""Feed-forward experts: up (and gate) projection, activation and down projection, stacked over all experts."""

from __future__ import annotations

import math
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.experts.base import Experts, cut, hold_activation
from moeify.exportable import apply_by_group, is_thin
from moeify.kernels import grouped_linear
from moeify.kernels.stacked import SWIGLU, Activation, Stacked


class FFN(Experts):
    """E feed-forward networks, stacked as transformers stacks them, so that exporting is renaming.

    Parameters are `gate_up_proj (E, 2H, D)`, or `up_proj (E, H, D)` without a gate, and `down_proj (E, O, H)`; with
    biases also `gate_up_proj_bias (E, 2H)` or `up_proj_bias (E, H)`, and `down_proj_bias (E, O)`.

    Args:
        num_experts: E.
        width: D.
        hidden: H.
        activation: between the projections; a gated one adds a gate projection; experts share its parameters.
        bias: give every projection a bias.
        width_out: O, D if not given.
        dropout: probability of dropping a hidden unit after the activation (expert dropout of Switch).
    """

    down_proj: nn.Parameter
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        activation: Activation = SWIGLU,
        bias: bool = False,
        width_out: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_experts, self.width, self.hidden = num_experts, width, hidden
        self.width_out = width if width_out is None else width_out
        self.activation = activation
        hold_activation(self, activation)
        self.dropout = nn.Dropout(dropout)
        self._up = "gate_up_proj" if activation.projections == 2 else "up_proj"
        for name, rows, columns in [
            (self._up, activation.projections * hidden, width),
            ("down_proj", self.width_out, hidden),
        ]:
            weight = torch.empty(num_experts, rows, columns).uniform_(-1, 1) / math.sqrt(columns)
            self.register_parameter(name, nn.Parameter(weight))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(num_experts, rows)) if bias else None)

    @property
    def up(self) -> tuple[Float[Tensor, "E M D"], Float[Tensor, "E M"] | None]:
        """Weight and bias of the up projection (with the gate projection, if any), under either name."""
        return getattr(self, self._up), getattr(self, f"{self._up}_bias")

    @property
    def activated(self) -> Float[Tensor, "E H D"]:
        """The weight of the projection into the activation."""
        return self.activation.activated(self.up[0])

    @property
    def down(self) -> tuple[Float[Tensor, "E O H"], Float[Tensor, "E O"] | None]:
        """Weight and bias of the down projection."""
        return self.down_proj, self.down_proj_bias

    @property
    def stacked(self) -> Stacked | None:
        """The stacked weights; None in dropout, or if the activation has trainable parameters."""
        if (self.training and self.dropout.p > 0) or "act" in self._modules:
            return None
        return Stacked(*self.up, *self.down, self.activation)

    def part(self, first: int, last: int) -> FFN:
        """The experts `first` to `last - 1` alone."""
        return cut(self, first, last)

    def common_modules(self) -> tuple[nn.Module, ...]:
        """The activation, if it has trainable parameters, which all experts share."""
        return (self.get_submodule("act"),) if "act" in self._modules else ()

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """`down(activation(up(rows)))`, each row by its own expert."""
        if torch.compiler.is_exporting() and not is_thin(self.down_proj):  # rows are found once for both projections
            return apply_by_group(rows, counts, [(1, partial(self._expert, e)) for e in range(self.num_experts)])
        return self.project_down(self.hidden_units(rows, counts), counts)

    def _expert(self, e: int, rows: Float[Tensor, "R D"], counts: Int[Tensor, "1"]) -> Float[Tensor, "R O"]:
        (up, up_bias), (down, down_bias) = self.up, self.down
        hidden = self.activation(F.linear(rows, up[e], None if up_bias is None else up_bias[e]))
        return F.linear(self.dropout(hidden), down[e], None if down_bias is None else down_bias[e])

    def hidden_units(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R H"]:
        """`activation(up(rows))`, some units dropped in training."""
        up, bias = self.up
        return self.dropout(self.activation(grouped_linear(rows, up, counts, bias)))

    def project_down(self, hidden: Float[Tensor, "R H"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """`down(hidden)`."""
        down, bias = self.down
        return grouped_linear(hidden, down, counts, bias)

    def extra_repr(self) -> str:
        """Sizes and activation."""
        widths = f"{self.width} -> {self.hidden} -> {self.width_out}"
        return f"experts={self.num_experts}, {widths}, activation={self.activation}"
