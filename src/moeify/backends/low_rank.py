"""Backend for `LoRA` experts of small rank: all of them at once, as one adapter of rank E r."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moeify.backends.base import needs_all_choices, needs_one_weight, needs_rows_only, needs_weights, sparse
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
    routing, tokens = sparse(routing), x.reshape(-1, x.shape[-1])
    if needs_all_choices(routing) is None:
        weights = _weights_of_choices(routing, experts)
    else:
        weights = _weights_of_rows(routing, experts)
        is_read = weights.new_zeros(len(tokens), 1, dtype=torch.bool).index_fill(0, routing.source, True)
        tokens = tokens.where(is_read, 0)  # padding may hold anything, NaN too
    down, up = experts.lora_A.flatten(0, 1), experts.lora_B
    low = F.linear(tokens.to(down.dtype), down).unflatten(1, (experts.num_experts, -1))
    low = (low * weights.unsqueeze(2)).to(low.dtype)
    if len(tokens) <= experts.rank:  # the outputs of all experts are smaller than a copy of B in another order
        y = torch.bmm(low.transpose(0, 1), up.mT).sum(0)
    else:
        y = F.linear(low.flatten(1), up.transpose(0, 1).flatten(1))
    return y.view(*x.shape[:-1], experts.width_out)


def _weights_of_choices(routing: Assignment, experts: LoRA) -> Float[Tensor, "T E"]:
    """Scaled by that of each expert; without the rows, whose order costs more than all else where tokens are few."""
    assert routing.choices is not None
    indices = routing.choices.indices
    scaled = routing.choices.weights.float() * experts.scale[indices]
    return scaled.new_zeros(len(indices), experts.num_experts).scatter_add(1, indices, scaled)


def _weights_of_rows(routing: Assignment, experts: LoRA) -> Float[Tensor, "T E"]:
    expert = routing.expert
    scaled = routing.weight.float() * experts.scale[expert]
    table = scaled.new_zeros(math.prod(routing.shape), experts.num_experts)
    return table.index_put((routing.source, expert), scaled, accumulate=True)


def refuse(x: Tensor, routing: Routing, experts: Experts) -> str | None:
    """The reason why this backend does not support a call, None if it does."""
    if not isinstance(experts, LoRA):
        return f"it needs LoRA experts, and these are {type(experts).__name__}"
    if experts.training and experts.dropout.p > 0:
        return "it computes a projection once per token, and dropout in training is drawn for every expert"
    return (
        needs_one_weight(routing)
        or needs_rows_only(routing)
        or needs_weights(x, experts, (experts.lora_A, experts.lora_B, experts.scale))
    )


def chosen(x: Tensor, routing: Routing, experts: Experts) -> bool:
    """Whether `auto` uses this backend: on a CPU, if the ranks of all experts are less work than the rows of k."""
    if not (x.is_cpu and isinstance(experts, LoRA) and isinstance(routing, Assignment)) or routing.choices is None:
        return False
    of_row = RANK_OF_ROW.get(experts.lora_A.dtype, 0)
    return experts.num_experts * experts.rank <= routing.choices.k * (experts.rank + of_row)
