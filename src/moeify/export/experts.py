"""Experts and shared experts as the stacked gated networks that other programs store, (E, 2H, D) and (E, D, H)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.compose.merge_weights import with_full_weights
from moeify.experts import FFN, Masked, MultiplicativeBias
from moeify.experts.lora import LoRA, LoRAFFN
from moeify.export.model_spec import Unsupported
from moeify.find.dense import DenseFFN
from moeify.kernels.stacked import Activation, Glu
from moeify.sparsify.shared import GatedShared


@dataclass(frozen=True)
class GatedFFNs:
    """Gated feed-forward networks (GLU) without biases, stacked by expert.

    Attributes:
        gate_up: gate and up projection side by side.
        down: the down projection.
        activation: of the gate.
        rewrites: descriptions of what was merged.
    """

    gate_up: Float[Tensor, "E M D"]
    down: Float[Tensor, "E O H"]
    activation: Glu
    rewrites: tuple[str, ...] = ()

    @property
    def hidden(self) -> int:
        """H."""
        return self.down.shape[-1]


@singledispatch
def gated_ffns(experts: nn.Module) -> GatedFFNs:
    """The experts of a layer, merged with their adapters if they have some.

    Raises:
        Unsupported: other experts, or ones with biases or without a gate.
    """
    raise Unsupported(f"its experts, {type(experts).__name__}, are not feed-forward networks of one hidden width")


@gated_ffns.register
def _(experts: FFN) -> GatedFFNs:
    (up, up_bias), (down, down_bias) = experts.up, experts.down
    return _checked(up, up_bias, down, down_bias, experts.activation)


@gated_ffns.register
def _(experts: MultiplicativeBias) -> GatedFFNs:
    inside = gated_ffns(experts.experts)
    return replace(inside, down=inside.down * experts.multiplicative_bias.unsqueeze(1))


@gated_ffns.register
def _(experts: Masked) -> GatedFFNs:
    return gated_ffns(experts.experts)


@gated_ffns.register
def _(experts: LoRAFFN) -> GatedFFNs:
    merged = gated_ffns(with_full_weights(experts))
    return replace(merged, rewrites=("adapters are merged into a network per expert",))


@gated_ffns.register
def _(experts: LoRA) -> GatedFFNs:
    raise Unsupported(
        "other programs support no adapters (LoRA) as experts beside single linear layers; those of MixLoRA, whose "
        "experts are whole feed-forward networks, are merged"
    )


def shared_of(shared: nn.Module | None) -> tuple[str, GatedFFNs, Tensor | None] | None:
    """The type of the shared expert, its network stacked with E = 1, and its gate; None if there is none.

    Raises:
        Unsupported: it is no gated network without biases.
    """
    if shared is None:
        return None
    kind, dense, gate = "plain", shared, None
    if isinstance(shared, GatedShared):
        kind, dense, gate = "gated", shared.dense, shared.gate.weight
    if not isinstance(dense, DenseFFN):
        raise Unsupported(f"its shared module is a {type(dense).__name__}, not a feed-forward network")
    up, down = dense.up_weight.unsqueeze(0), dense.down_weight.unsqueeze(0)
    return kind, _checked(up, dense.up_bias, down, dense.down_bias, dense.activation), gate


def _checked(
    up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: Activation
) -> GatedFFNs:
    if any(bias is not None and torch.any(bias) for bias in (up_bias, down_bias)):
        raise Unsupported("its experts have biases")
    if not isinstance(activation, Glu):
        raise Unsupported(
            f"its experts compute {activation}, and other programs store experts with a plain gate (GLU) only"
        )
    return GatedFFNs(up, down, activation)
