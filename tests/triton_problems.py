"""Small problems for kernels, on a GPU if there is one and for Triton's interpreter otherwise."""

from dataclasses import is_dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from moeify import Assignment, assign
from moeify.capacity import limit
from moeify.experts import FFN
from moeify.kernels.stacked import KNOWN, ClampedGlu, Glu, Plain
from moeify.routing import assign_where

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
ACTIVATIONS = {
    **{name: Plain(act) for name, act in KNOWN.items()},
    "swiglu": Glu(F.silu),
    "geglu": Glu(KNOWN["gelu_tanh"]),
    "reglu": Glu(F.relu),
    "clamped": ClampedGlu(limit=1.0),
}
COUNTS = {
    "even": [4, 4, 4],
    "empty experts": [0, 18, 0, 0],
    "more experts than rows": [0] * 40 + [1] + [0] * 3,
    "one row": [0, 1],
    "two tiles and a bit": [3, 35],
    "nobody": [0, 0],
}


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def decisions(tokens: int = 11, experts: int = 4) -> dict[str, Assignment]:
    """Decisions of every form, with weights that require a gradient."""
    index = torch.rand(tokens, experts).topk(2).indices
    gates = torch.rand(tokens, 2)
    chosen = torch.rand(tokens, experts) < 0.4
    chosen[-1:] = False
    found = {
        "k choices": assign(index, gates, experts),
        "padding": assign(index[1:], gates[1:], experts, shape=(tokens,), positions=torch.arange(tokens - 1)),
        "dropped": limit(assign(index, gates, experts), 3),
        "any number": assign_where(chosen, torch.rand(tokens, experts)),
        "all to one": assign(torch.full_like(index[:, :1], 1), gates[:, :1], experts),
        "one token": assign(index[:1], gates[:1], experts),
        "no token": assign(index[:0], gates[:0], experts),
    }
    return {name: moved(decision) for name, decision in found.items()}


def moved(decision: Assignment) -> Assignment:
    """The decision on the device, its weights a leaf."""
    there = _on_device(decision)
    return replace(there, weight=there.weight.detach().requires_grad_())


def _on_device(value):
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if is_dataclass(value):
        return replace(value, **{name: _on_device(part) for name, part in vars(value).items()})
    return value


def experts(
    activation, bias: bool, *, width: int = 40, hidden: int = 24, width_out: int = 36, num_experts: int = 4
) -> FFN:
    """Experts whose biases are not zero and whose activations leave the region around zero."""
    ffn = FFN(num_experts, width, hidden, activation=activation, bias=bias, width_out=width_out)
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return ffn.to(DEVICE)
