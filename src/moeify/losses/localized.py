"""Localized balancing: experts are balanced within the type of a sample, not across types (LoRAMoE)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeify.losses.loads import probability
from moeify.routing import Routing


def localized(routing: Routing, delta: float = 0.1, types: Int[Tensor, "E"] | None = None) -> Float[Tensor, ""]:
    """CV² of Z_bj = I_bj · Σ_{t in sample b} g_tj, I = 1 + δ where expert j is of sample b's type, 1 - δ elsewhere.

    The localized balancing constraint of LoRAMoE (arXiv 2312.09979). The variance is the unbiased one over all samples
    and experts, over the squared mean, as in the authors' code; the paper writes σ²(Z) / μ(Z). Padding does not count.
    It is 0 where Z is the same everywhere, so where experts of the other type weigh (1 + δ) / (1 - δ) times as much as
    those of the sample's own: a negative δ prefers the own ones.

    Args:
        routing: a decision of `AllExperts` with the type of each sample.
        delta: δ, between -1 and 1.
        types: the type of every expert; by default those of the first half are of type 0, the others of type 1.

    Raises:
        ValueError: the decision keeps no scores, or does not record its samples and their types.
    """
    p = probability(routing)
    label = routing.evidence.label
    if label is None or routing.sequence_id is None:
        raise ValueError(
            "this decision does not record the types of its samples; route by AllExperts, and call the model inside "
            "extra_inputs(model, task_type=...)"
        )
    experts = p.shape[-1]
    types = 2 * torch.arange(experts, device=p.device) // experts if types is None else types.to(p.device)
    sample = routing.sequence_id.unique(return_inverse=True)[1]
    samples = int(sample.max()) + 1
    importance = p.new_zeros(samples, experts).index_add(0, sample, p)
    own = label.new_zeros(samples).scatter(0, sample, label).unsqueeze(1) == types
    z = importance * torch.where(own, 1 + delta, 1 - delta)
    return z.var() / (z.mean().square() + 1e-10)
