"""Backends in plain torch, among them the definition."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.experts.base import Experts
from moeify.routing import Assignment, Routing


def compose(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Tensor:
    """`C · experts(D · x)`, the definition of a sparse layer."""
    return routing.combine(experts(routing.dispatch(x), routing.counts))


def gather(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Tensor:
    """Undo the sort and add up each token's K answers: no atomic additions, so deterministic on a GPU."""
    assert isinstance(routing, Assignment)
    assert routing.rank is not None
    assert routing.choices is not None
    rows = experts(routing.dispatch(x), routing.counts)
    tokens, k = routing.choices.indices.shape
    place = routing.source * k + routing.rank
    order = torch.empty_like(place).scatter(0, place, torch.arange(place.shape[0], device=place.device))
    weighted = rows.float() * routing.weight.float().unsqueeze(-1)
    return weighted[order].view(tokens, k, rows.shape[-1]).sum(1).view(*routing.shape, rows.shape[-1]).to(rows.dtype)


def cannot_gather(x: Tensor, routing: Routing, experts: Experts) -> str | None:
    """Why `gather` cannot serve a call, None if it can."""
    if not isinstance(routing, Assignment):
        return f"it needs an Assignment, and the router gave a {type(routing).__name__}"
    if routing.choices is None or routing.rank is None:
        return "it needs the same number of experts for every token"
    if not routing.has_all_rows:
        return "it needs every row of every token, and some are padding or were dropped"
    if routing.default_output is not None:
        return "it adds up rows only, and this router also speaks for experts that were not asked"
    if routing.has_gate_axis:
        return "it needs one weight per row, and the router gave several gates"
    return None


def answered(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Tensor:
    """Combine the answers that the router has asked for already: no expert runs twice."""
    assert routing.expert_outputs is not None
    return routing.combine(routing.expert_outputs)


def unanswered(x: Tensor, routing: Routing, experts: Experts) -> str | None:
    """Why `answered` cannot serve a call, None if it can."""
    if routing.expert_outputs is None:
        return "it needs a decision that brings the experts' answers, as only a router does that asks them first"
    return None
