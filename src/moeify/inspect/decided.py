"""Turn a routing decision into the columns of a trace: one row per real token, K experts in each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moeify.routing import Assignment, Mixture, Routing


@dataclass(frozen=True, kw_only=True)
class Decided:
    """A decision with one row per real token; the attributes are those of `LayerTrace`."""

    experts: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"] | None = None
    dropped: Bool[Tensor, "T K"] | None = None
    scores: Float[Tensor, "T E"] | None = None
    logits: Float[Tensor, "T E"] | None = None


@torch.no_grad()
def decided(
    routing: Routing, positions: Int[Tensor, "T"], sequence: Int[Tensor, "T"], *, scores: bool, logits: bool
) -> Decided:
    """The decision with one row per real token.

    Args:
        routing: the decision of a layer.
        positions: of the real tokens, among all of them.
        sequence: the index of each token's sequence, to repeat a decision made once per sequence.
        scores: whether to keep scores.
        logits: whether logits are.
    """
    positions = positions.to(routing.counts.device)
    if isinstance(routing, Mixture):
        none = torch.empty(len(positions), 0, dtype=torch.long)
        return Decided(experts=none, scores=_slot_weights(routing)[positions] if scores else None)
    assert isinstance(routing, Assignment)
    columns = (_chosen if _has_choices(routing, len(positions)) else _counted)(routing, positions)
    return Decided(
        **columns,
        scores=_by_token(routing.scores, routing, sequence) if scores else None,
        logits=_by_token(routing.logits, routing, sequence) if logits else None,
    )


def _has_choices(routing: Assignment, tokens: int) -> bool:
    """Whether every token has K choices, and it is known which of these a row is."""
    return routing.choices is not None and routing.rank is not None and len(routing.choices.indices) == tokens


def _by_token(values: Tensor | None, routing: Assignment, sequence: Tensor) -> Tensor | None:
    """Scores of every token: of its own decision, or of that of its sequence; None if neither fits."""
    if values is None or len(values) == len(sequence):
        return None if values is None else values.float()
    decided = routing.sequence_id
    if decided is None or len(decided) != len(values) or len(decided.unique()) != len(decided):
        return None
    matches = decided.unsqueeze(0) == sequence.to(decided.device).unsqueeze(1)  # (T, L)
    return values.float()[matches.int().argmax(1)] if bool(matches.any(1).all()) else None


def _slot_weights(mixture: Mixture) -> Float[Tensor, "all E"]:
    """How much of every token's output comes from the slots of each expert."""
    by_expert = mixture.out_of.unflatten(-1, (len(mixture.counts), -1)).sum(-1).flatten(0, -2)
    if mixture.source is None:
        return by_expert.float()
    tokens = len(mixture.weight_table())
    return by_expert.new_zeros(tokens, by_expert.shape[1]).index_add(0, mixture.source.flatten(), by_expert).float()


def _chosen(routing: Assignment, positions: Int[Tensor, "T"]) -> dict[str, Tensor]:
    """The choices, with the dropped and moved rows marked if there is a capacity."""
    assert routing.choices is not None
    experts, weights = routing.choices.indices, _one_weight(routing.choices.weights, 2)
    if not routing.is_limited:
        return {"experts": experts, "weights": weights}
    assert routing.rank is not None
    at = _places(routing, positions)[routing.source], routing.rank
    return {
        "experts": experts.index_put(at, routing.expert.to(experts.dtype)),
        "weights": weights.index_put(at, _one_weight(routing.weight, 1)),
        "dropped": torch.ones_like(experts, dtype=torch.bool).index_put(at, experts.new_zeros((), dtype=torch.bool)),
    }


def _counted(routing: Assignment, positions: Int[Tensor, "T"]) -> dict[str, Tensor]:
    """The rows of every token, those of large weights first: as many columns as the token with the most has rows."""
    token, weight = _places(routing, positions)[routing.source], _one_weight(routing.weight, 1)
    order = weight.argsort(descending=True, stable=True)
    order = order[token[order].argsort(stable=True)]
    token, expert, weight = token[order], routing.expert[order], weight[order]
    rows = token.bincount(minlength=len(positions))
    at = token, torch.arange(len(token), device=token.device) - (rows.cumsum(0) - rows)[token]
    shape = (len(positions), int(rows.max()))
    return {
        "experts": expert.new_full(shape, -1).index_put(at, expert),
        "weights": weight.new_zeros(shape).index_put(at, weight),
    }


def _places(routing: Assignment, positions: Int[Tensor, "T"]) -> Int[Tensor, "all"]:
    """The index of every token among the real tokens."""
    place = positions.new_full((math.prod(routing.shape),), -1)
    return place.index_put((positions,), torch.arange(len(positions), device=positions.device))


def _one_weight(weight: Float[Tensor, "... *G"], dimensions: int) -> Float[Tensor, "..."]:
    """The weight of each row; with several gates, their sum."""
    return weight.float() if weight.dim() == dimensions else weight.float().flatten(dimensions).sum(-1)
