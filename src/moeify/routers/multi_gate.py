"""Multi-gate routing: one gate per task over the same experts, each of which runs once (MMoE, CGC)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, Tokens, best_indices, project, real_tokens
from moeify.routers.topk import check_k
from moeify.routing import Assignment, Evidence


@register("router", "multi_gate")
class MultiGate(Router):
    """G softmax gates over all experts (MMoE, KDD 2018), or each over its own and the shared ones (CGC, RecSys 2020).

        g_k = softmax(W_k x) over the experts that gate k sees;  y_k = Σ_j g_kj f_j(x)

    The layer's output is (..., G, O). Every decision of every gate is one of the L decisions that losses see.

    Args:
        width: D.
        num_experts: E.
        gates: G.
        private: experts that belong to each gate alone, the first of them to the first gate; all others are shared.

    Raises:
        ValueError: more private experts than there are experts, or a gate without an expert.
    """

    weights_sum_to_one = True

    def __init__(self, width: int, num_experts: int, *, gates: int, private: int = 0) -> None:
        super().__init__()
        self.num_experts, self.gates, self.private = num_experts, gates, private
        self.register_buffer("sees", visible(num_experts, gates, private), persistent=False)
        self.weight = xavier(gates, num_experts, width)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Give every real token to every expert, with one weight per gate."""
        tokens = real_tokens(x, context)
        logits = gate_logits(tokens, self.weight, self.sees)
        scores = logits.softmax(-1)
        indices = torch.arange(self.num_experts, device=x.device).expand(scores.shape[0], -1)
        return tokens.assign(indices, scores.mT, self.num_experts, decisions(tokens, logits, scores))

    def extra_repr(self) -> str:
        """The gates, and the experts that each sees."""
        return f"experts={self.num_experts}, gates={self.gates}, private={self.private}"


@register("router", "sparse_multi_gate")
class SparseMultiGate(Router):
    """G gates of up to k experts each, which together choose at most `union` experts per token.

    Without the bound the gates of many tasks make nearly every expert run. The union takes every gate's first choice,
    then the experts with the largest weights summed over the gates that chose them; each gate's weights are its
    probabilities for those of its choices in the union, normalised.

    Args:
        width: D.
        num_experts: E.
        gates: G.
        k: experts per gate.
        union: experts per token, of all gates together.
        private: experts that belong to each gate alone, see `MultiGate`.

    Raises:
        ValueError: k outside what a gate sees, or a union too small for the first choice of every gate.
    """

    weights_sum_to_one = True

    def __init__(
        self, width: int, num_experts: int, *, gates: int, k: int = 2, union: int = 4, private: int = 0
    ) -> None:
        super().__init__()
        sees = visible(num_experts, gates, private)
        check_k(k, int(sees[0].sum()), normalize=True)
        if union < gates:
            raise ValueError(f"a union of {union} experts is too small for the first choice of each of {gates} gates")
        self.num_experts, self.gates, self.per_gate, self.union = num_experts, gates, k, min(union, num_experts)
        self.register_buffer("sees", sees, persistent=False)
        self.weight = xavier(gates, num_experts, width)

    @property
    def k(self) -> int:
        """The most experts that all gates of one token choose together."""
        return min(self.union, self.gates * self.per_gate)

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token to the union of experts that its gates choose."""
        tokens = real_tokens(x, context)
        logits = gate_logits(tokens, self.weight, self.sees)
        scores = logits.softmax(-1)
        chosen_by_gate = among(scores, self.per_gate)
        kept = self._union(scores.detach() * chosen_by_gate, among(scores, 1).any(1))
        weight = scores * (chosen_by_gate & kept.unsqueeze(1))  # (T, G, E)
        weight = weight / weight.sum(-1, keepdim=True)
        chosen = (chosen_by_gate & kept.unsqueeze(1)).any(1)
        return tokens.assign_where(chosen, weight.mT, decisions(tokens, logits, scores))

    def _union(self, chosen_by_gate: Float[Tensor, "T G E"], first: Bool[Tensor, "T E"]) -> Bool[Tensor, "T E"]:
        """The experts of the union; a sum over gates is at most G, so first choices come before all others."""
        return among(chosen_by_gate.sum(1) + (self.gates + 1) * first, self.union)

    def extra_repr(self) -> str:
        """How many experts each gate, and all of them together, may choose."""
        return f"experts={self.num_experts}, gates={self.gates}, per_gate={self.per_gate}, union={self.union}"


def visible(num_experts: int, gates: int, private: int) -> Bool[Tensor, "G E"]:
    """Which experts each gate sees: its own `private` ones, which come first, and the shared ones after them.

    Raises:
        ValueError: no gate, more private experts than there are experts, or a gate that sees none.
    """
    shared = num_experts - gates * private
    if gates < 1 or private < 0 or shared < 0 or private + shared < 1:
        raise ValueError(
            f"{gates} gates with {private} private experts each do not fit into {num_experts} experts; "
            "choose gates >= 1 and num_experts >= gates * private, and leave every gate an expert"
        )
    own = torch.eye(gates, dtype=torch.bool).repeat_interleave(private, dim=1)
    return torch.cat([own, torch.ones(gates, shared, dtype=torch.bool)], dim=1)


def xavier(gates: int, num_experts: int, width: int) -> nn.Parameter:
    """(G, E, D), each gate drawn as a linear layer of its own (Xavier)."""
    bound = math.sqrt(6 / (width + num_experts))
    return nn.Parameter(torch.empty(gates, num_experts, width).uniform_(-bound, bound))


def gate_logits(tokens: Tokens, weight: Float[Tensor, "G E D"], sees: Bool[Tensor, "G E"]) -> Float[Tensor, "T G E"]:
    """Every gate's logits; an expert that a gate does not see has the lowest finite one, hence probability 0."""
    logits = project(tokens.x, weight.flatten(0, 1)).unflatten(-1, sees.shape)
    return logits.masked_fill(~sees, torch.finfo(logits.dtype).min)


def among(values: Float[Tensor, "... E"], k: int) -> Bool[Tensor, "... E"]:
    """Which of the values are among the k largest."""
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, best_indices(values, k), True)


def decisions(tokens: Tokens, logits: Float[Tensor, "T G E"], scores: Float[Tensor, "T G E"]) -> Evidence:
    """The logits and scores of every gate, as T · G decisions."""
    sequence_id = tokens.sequence_id.repeat_interleave(logits.shape[1])
    return Evidence(logits=logits.flatten(0, 1), scores=scores.flatten(0, 1), sequence_id=sequence_id)
