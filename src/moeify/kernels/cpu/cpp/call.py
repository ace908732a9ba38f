"""The C++ kernel of a fused sparse layer, as a custom operator of torch."""

from __future__ import annotations

import ctypes

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch import library as operators

from moeify.kernels.cpu.cpp.build import library
from moeify.kernels.cpu.cpp.reading import reading
from moeify.kernels.cpu.cpp.structs import ACTIVATIONS, FORMATS, GATING, Call, Stack

_OPERATORS = operators.Library("moeify", "FRAGMENT")
_OPERATORS.define(
    "cpp_layer(Tensor x, Tensor source, Tensor weight, Tensor counts, Tensor? default_output, Tensor up, "
    "Tensor? up_bias, "
    "Tensor? up_scales, Tensor down, Tensor? down_bias, Tensor? down_scales, int hidden, int group_size, str gating, "
    "str activation, float alpha, float limit) -> Tensor"
)


def cpp_layer(
    x: Float[Tensor, "T D"],
    source: Int[Tensor, "R"],
    weight: Float[Tensor, "R"],
    counts: Int[Tensor, "E"],
    default_output: Float[Tensor, "T O"] | None,
    up: Tensor,
    up_bias: Float[Tensor, "E M"] | None,
    up_scales: Float[Tensor, "E M *groups"] | None,
    down: Tensor,
    down_bias: Float[Tensor, "E O"] | None,
    down_scales: Float[Tensor, "E O *groups"] | None,
    hidden: int,
    group_size: int,
    gating: str,
    activation: str,
    alpha: float,
    limit: float,
) -> Float[Tensor, "T O"]:
    """Every token's weighted sum of expert outputs, plus its default output.

    Args:
        x: tokens, in fp32 or bf16; the output has their dtype.
        source: the token of every row.
        weight: the weight of every row.
        counts: the rows of every expert.
        default_output: the output added to every token, in addition to the weighted expert outputs.
        up: up projection (E, M, D) in the dtype of x, or quantised as in `moeify.experts.quantized`.
        up_bias: bias of the up projection, in the dtype of x.
        up_scales: quantisation scales of the up projection.
        down: down projection (E, O, H), in the same format as `up`.
        down_bias: bias of the down projection, in the dtype of x.
        down_scales: quantisation scales of the down projection.
        hidden: H, the number of hidden units per expert.
        group_size: int4 weights of a row that share a scale.
        gating: "plain", "glu" or "clamped".
        activation: a name of `moeify.kernels.stacked.KNOWN`.
        alpha: of "clamped", see `moeify.kernels.stacked.ClampedGlu`.
        limit: of "clamped".

    Raises:
        ValueError: the counts do not sum to R, or a source is not a token index.
        Unavailable: the C++ kernels are not available.
    """
    tokens, width = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.zeros(tokens, down.shape[1], dtype=torch.float32, device=x.device)
    if default_output is not None:
        y.copy_(default_output)
    weight, source, counts = weight.float().contiguous(), source.contiguous(), counts.contiguous()
    up_bias, down_bias = (None if bias is None else bias.contiguous() for bias in (up_bias, down_bias))
    call = Call(
        x.data_ptr(), x.stride(0), tokens, len(source), source.data_ptr(), weight.data_ptr(), counts.data_ptr(),
        len(counts), width, hidden, down.shape[1],
        stack(up, up_bias, up_scales, group_size), stack(down, down_bias, down_scales, group_size),
        GATING.index(gating), ACTIVATIONS.index(activation), alpha, limit, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if library().moeify_layer(ctypes.byref(call), x.dtype == torch.bfloat16):
        raise ValueError(f"a decision over {len(source)} rows does not fit {tokens} tokens: wrong counts or sources")
    return y.to(x.dtype)


def stack(weight: Tensor, bias: Tensor | None, scales: Tensor | None, group_size: int) -> Stack:
    """The C struct of stacked projections (E, O, D); it holds no reference to the tensors."""
    how = reading(weight.dtype, weight.nbytes)
    return Stack(
        weight.data_ptr(),
        None if scales is None else scales.data_ptr(),
        None if bias is None else bias.data_ptr(),
        weight.stride(0),
        weight.stride(1),
        0 if bias is None else bias.stride(0),
        FORMATS[weight.dtype],
        group_size,
        how.in_order,
        how.prefetch,
    )


_OPERATORS.impl("cpp_layer", cpp_layer, "CPU")


@operators.register_fake("moeify::cpp_layer", lib=_OPERATORS)
def _(x: Tensor, *arguments: object) -> Tensor:
    down = arguments[7]
    assert isinstance(down, Tensor)
    return x.new_empty(x.shape[0], down.shape[1])
