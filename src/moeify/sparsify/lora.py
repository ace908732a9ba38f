"""LoRA experts: beside a linear layer, or inside a whole feed-forward network (MixLoRA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeify.experts.lora import LoRA, LoRAFFN
from moeify.find.dense import DenseFFN, is_linear, is_quantized, parameters_of, widths
from moeify.registry import register


@register("experts", "lora")
def lora(dense: nn.Module, num_experts: int, *, rank: int = 8, scale: float = 1.0, dropout: float = 0.0) -> LoRA:
    """Low-rank experts for a linear layer, or any other module; they start at 0, so keep the module in `shared`.

    Args:
        dense: the module that they adapt: a linear layer (`where=linears(...)`), or a feed-forward network.
        num_experts: E.
        rank: r.
        scale: multiplies the outputs; `alpha / rank` where a paper gives alpha.
        dropout: probability of dropping an input in training.
    """
    (_, width), (width_out, _), like = _ends(dense)
    return _lora(width, width_out, num_experts, rank, scale, dropout, like)


@register("experts", "lora_ffn")
def lora_ffn(dense: nn.Module, num_experts: int, *, rank: int = 8, scale: float = 1.0, dropout: float = 0.0) -> LoRAFFN:
    """Experts that are the dense network, frozen, with low-rank updates of their own to its projections (MixLoRA).

    Args:
        dense: a `DenseFFN`.
        num_experts: E.
        rank: r.
        scale: multiplies the changes; `alpha / rank` where a paper gives alpha.
        dropout: probability of dropping an input of a change in training.

    Raises:
        ValueError: the module is no `DenseFFN`.
    """
    if not isinstance(dense, DenseFFN):
        raise ValueError(
            f"lora_ffn is for the projections of a feed-forward network, this is a {type(dense).__name__}; use lora"
        )
    up, down = dense.up_weight, dense.down_weight
    for parameter in parameters_of(dense.activation.act):
        parameter.requires_grad_(False)
    return LoRAFFN(
        _frozen_linear(up, dense.up_bias),
        _frozen_linear(down, dense.down_bias),
        dense.activation,
        _lora(up.shape[1], up.shape[0], num_experts, rank, scale, dropout, like=up),
        _lora(down.shape[1], down.shape[0], num_experts, rank, scale, dropout, like=down),
    )


def _ends(dense: nn.Module) -> tuple[tuple[int, int], tuple[int, int], Tensor]:
    """The widths of the first and the last linear layer of a module, and a tensor with the dtype and device of experts.

    Beside a quantised layer they compute in fp32, until they are cast to the dtype of the model.
    """
    if isinstance(dense, DenseFFN):
        return (0, dense.width), (dense.width_out, 0), dense.down_weight
    linears = [part for part in dense.modules() if is_linear(part) or is_quantized(part)]
    weight = linears[-1].get_parameter("weight")
    like = torch.empty(0, device=weight.device) if is_quantized(linears[-1]) else weight
    return widths(linears[0]), widths(linears[-1]), like


def _lora(width: int, width_out: int, num_experts: int, rank: int, scale: float, dropout: float, like: Tensor) -> LoRA:
    with torch.device(like.device):
        experts = LoRA(num_experts, width, width_out, rank=rank, scale=scale, dropout=dropout)
    return experts.to(like.dtype)


def _frozen_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer that shares the memory of a weight and does not train it."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
