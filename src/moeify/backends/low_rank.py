"""Backend for `LoRA` experts of small rank: all of them at once, as one adapter of rank E r."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moeify.backends.base import needs_one_weight, needs_rows_only, needs_weights, sparse
from moeify.experts.base import Experts
from moeify.experts.lora import LoRA
from moeify.routing import Assignment, Routing

RANK_OF_ROW = {torch.float32: 48, torch.bfloat16: 128}
"""The rank whose products take as long as gathering and adding up a row, on a CPU."""


def run(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Float[Tensor, "... O"]:
    """`B (g ⊙ A x)`: A and B hold all experts one after another, and g their weights at the token, most of them 0.

    Two matrix products in the place of rows that are gathered, projected expert by expert, and added up. They compute
    E / k times as many low-rank projections, but nothing of the size (R, D).
    """
    assert isinstance(experts, LoRA)
    routing = sparse(routing)
    expert = routing.expert
    of_rows = routing.weight.float() * experts.scale[expert]
    weights = of_rows.new_zeros(math.prod(routing.shape), experts.num_experts)
    weights = weights.index_put((routing.source, expert), of_rows, accumulate=True)
    down, up = experts.lora_A.flatten(0, 1), experts.lora_B.transpose(0, 1).flatten(1)
    low = F.linear(x.reshape(-1, x.shape[-1]).to(down.dtype), down).unflatten(1, (experts.num_experts, -1))
    low = (low * weights.unsqueeze(2)).to(low.dtype)
    return F.linear(low.flatten(1), up).view(*x.shape[:-1], -1)


def refuse(x: Tensor, routing: Routing, experts: Experts) -> str | None:
    """The reason why this backend does not support a call, None if it does."""
    if not isinstance(experts, LoRA):
        return f"it needs LoRA experts, and these are {type(experts).__name__}"
    if experts.training and experts.dropout.p > 0:
        return "it computes a projection once per token, and dropout in training is drawn for every expert"
    if reason := needs_one_weight(routing) or needs_rows_only(routing):
        return reason
    if sparse(routing).tokens != math.prod(routing.shape):
        return "it reads every token, and some are padding"
    return needs_weights(x, experts, (experts.lora_A, experts.lora_B, experts.scale))


def chosen(x: Tensor, routing: Routing, experts: Experts) -> bool:
    """Whether `auto` uses this backend: on a CPU, if the ranks of all experts are less work than the rows of k."""
    if not (x.is_cpu and isinstance(experts, LoRA) and isinstance(routing, Assignment)) or routing.choices is None:
        return False
    of_row = RANK_OF_ROW.get(experts.lora_A.dtype, 0)
    return experts.num_experts * experts.rank <= routing.choices.k * (experts.rank + of_row)
