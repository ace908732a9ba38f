"""The backend `cpp`: a sparse layer fused into one C++ kernel, on a CPU, without gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.backends.base import (
    needs_cpu,
    needs_dtype,
    needs_no_autocast,
    needs_no_gradient,
    needs_no_transform,
    needs_one_weight,
    needs_stacked,
    needs_weights,
    sparse,
)
from moeify.experts.base import Experts
from moeify.experts.quantized import Quantized
from moeify.kernels.constant import constant_result
from moeify.kernels.cpu import cpp
from moeify.kernels.cpu.cpp import steps
from moeify.kernels.cpu.huge_pages import in_place
from moeify.kernels.cpu.layer_crossover import max_layer_rows
from moeify.kernels.cpu.packing import cached, may_pack
from moeify.kernels.cpu.segments import WORTH_COMPILING
from moeify.kernels.stacked import Activation, ClampedGlu, Glu, Plain, name_of, unsupported_activation
from moeify.routing import Routing

DTYPES = (torch.float32, torch.bfloat16)
_TRANSPOSED = "it reads weights row by row, and these are transposed; moeify.kernels.cpu.packing.pack allows a copy"


@dataclass(frozen=True)
class Projections:
    """The up and the down projection of all experts, as arguments of the kernel."""

    up: Tensor
    up_bias: Tensor | None
    up_scales: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    down_scales: Tensor | None
    hidden: int
    group_size: int
    activation: Activation

    @property
    def tensors(self) -> list[Tensor]:
        """The weights, biases and scales that are not None."""
        found = [self.up, self.up_bias, self.up_scales, self.down, self.down_bias, self.down_scales]
        return [tensor for tensor in found if tensor is not None]


def projections_of(experts: Experts) -> Projections | None:
    """The projections of experts as arguments of the kernel, None for experts without stacked weights."""
    stored = _stored(experts)
    if stored is None or stored.up_scales is not None:
        return stored
    return replace(stored, up=_by_rows(stored.up, experts), down=_by_rows(stored.down, experts))


def _stored(experts: Experts) -> Projections | None:
    if isinstance(experts, Quantized):
        up, down = experts.up, experts.down
        return Projections(
            up.weight,
            up.bias,
            up.scales,
            down.weight,
            down.bias,
            down.scales,
            experts.hidden,
            up.group_size,
            experts.activation,
        )
    s = experts.stacked
    if s is None:
        return None
    return Projections(s.up, s.up_bias, None, s.down, s.down_bias, None, s.down.shape[2], 0, s.activation)


def _by_rows(weight: Float[Tensor, "E O D"], experts: Experts) -> Float[Tensor, "E O D"]:
    """The weight; for a transposed one a cached row-major copy, if `pack` allows it."""
    if not _is_transposed(weight) or not _may_copy(weight, experts):
        return weight
    owner = weight if weight._base is None else weight._base
    return cached(owner, "cpp", [weight], weight.detach().contiguous)


def _is_transposed(weight: Tensor) -> bool:
    return weight.stride(-1) != 1


def _may_copy(weight: Tensor, experts: Experts) -> bool:
    return not torch.compiler.is_compiling() and not weight.is_inference() and may_pack(experts)


def run(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Tensor:
    """Compute the layer with the C++ kernel."""
    routing = sparse(routing)
    p = projections_of(experts)
    assert p is not None
    if not torch.compiler.is_compiling():
        in_place(p.up)
        in_place(p.down)
    layer = torch.ops.moeify.cpp_layer if torch.compiler.is_compiling() else cpp.cpp_layer
    y = layer(
        x.reshape(-1, x.shape[-1]), routing.source, routing.weight, routing.counts, routing.default_output,
        p.up, p.up_bias, p.up_scales, p.down, p.down_bias, p.down_scales,
        p.hidden, p.group_size, *kernel_activation(p.activation),
    )  # fmt: skip
    return y.view(*routing.shape, y.shape[-1])


def refuse(x: Tensor, routing: Routing, experts: Experts) -> str | None:
    """The reason why the C++ kernel does not support a call, None if it does."""
    if reason := needs_cpu(x) or needs_one_weight(routing):
        return reason
    p = _stored(experts)
    if reason := _cannot_read(x, experts, p) or needs_no_gradient([x, sparse(routing).weight]):
        return reason
    stays = p is not None and any(_is_transposed(w) and not _may_copy(w, experts) for w in (p.up, p.down))
    return _TRANSPOSED if stays else None


def _cannot_read(x: Tensor, experts: Experts, p: Projections | None) -> str | None:
    """The reason why the C++ kernel does not support experts for these tokens, None if it does."""
    if p is None:
        return needs_stacked(experts)
    if reason := needs_weights(x, experts, p.tensors):
        return reason
    if reason := unsupported_activation(p.activation):
        return reason
    floats = [p.up_bias, p.down_bias] if p.up_scales is not None else [p.up_bias, p.down_bias, p.up, p.down]
    dtypes = needs_no_autocast(x) or needs_dtype(x, DTYPES, floats)
    if reason := needs_no_transform() or dtypes or needs_no_gradient(p.tensors):
        return reason
    return _unavailable()


def chosen(x: Tensor, routing: Routing, experts: Experts) -> bool:
    """Whether the experts are large enough, and rows per expert few enough, for the kernel to be the fastest."""
    if x.device.type != "cpu":
        return False
    if isinstance(experts, Quantized):
        return experts.up.weight.numel() >= WORTH_COMPILING
    if (stacked := experts.stacked) is None or stacked.up.numel() < WORTH_COMPILING:
        return False
    return routing.num_rows <= max_layer_rows(x.dtype, packs=may_pack(experts)) * experts.num_experts


def step_experts(experts: Experts, width: int, dtype: torch.dtype) -> steps.Experts | None:
    """The experts as an operand of a decoding step, None if the kernel does not support them.

    Args:
        experts: the experts.
        width: D.
        dtype: dtype of the tokens.
    """
    p = projections_of(experts)
    if p is None or _cannot_read(torch.zeros(1, width, dtype=dtype), experts, p) is not None:
        return None
    if _is_transposed(p.up) or _is_transposed(p.down):  # and `pack` does not allow a copy
        return None
    up, down = (p.up, p.up_bias, p.up_scales), (p.down, p.down_bias, p.down_scales)
    return steps.Experts(width, up, down, p.hidden, p.group_size, *kernel_activation(p.activation))


def kernel_activation(activation: Activation) -> tuple[str, str, float, float]:
    """An activation as arguments of the kernel: gating, elementwise function, alpha and limit."""
    if isinstance(activation, ClampedGlu):
        return "clamped", "silu", activation.alpha, activation.limit
    assert isinstance(activation, Plain | Glu)
    name = name_of(activation.act)
    assert name is not None
    return ("glu" if isinstance(activation, Glu) else "plain"), name, 0.0, 0.0


@constant_result
def _unavailable() -> str | None:
    return cpp.why_not()
