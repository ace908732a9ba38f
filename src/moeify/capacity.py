"""Capacity: formulas for the number of rows that an expert accepts, and `limit`, which drops or moves the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeify.registry import register
from moeify.routing import Assignment

Count = Any
"""A number of tokens or slots: an integer, the open size of a graph, or a tensor with one for each group."""


@register("capacity", "tokens")
def per_token(factor: float, tokens: Count, num_experts: int, k: int) -> Count:
    """floor(factor · T / E), at least 4: second choices are not counted (Switch and ST-MoE in Mesh TensorFlow).

    flaxformer, which trained later models of these authors, rounds to the nearest number.
    """
    slots = _floor(factor * tokens / num_experts)
    return slots.clamp_min(4) if isinstance(slots, Tensor) else torch.sym_max(4, slots)


@register("capacity", "choices")
def per_choice(factor: float, tokens: Count, num_experts: int, k: int) -> Count:
    """ceil(factor · k · T / E): every choice is counted (Megatron-Core)."""
    return _ceil(factor * k * tokens / num_experts)


@register("capacity", "choices_by_4")
def per_choice_by_4(factor: float, tokens: Count, num_experts: int, k: int) -> Count:
    """ceil(factor · k · T / E), rounded up to a multiple of 4 (V-MoE): far more than the factor for few tokens."""
    return 4 * _ceil(per_choice(factor, tokens, num_experts, k) / 4)


@register("capacity", "double")
def double(factor: float, tokens: Count, num_experts: int, k: int) -> Count:
    """factor · 2 · ceil(T / E), for any k (fairseq's top-2, NLLB)."""
    return _ceil(factor * 2 * _ceil(tokens / num_experts))


def _floor(value: Count) -> Count:
    return value.floor().long() if isinstance(value, Tensor) else math.floor(value)


def _ceil(value: Count) -> Count:
    return value.ceil().long() if isinstance(value, Tensor) else math.ceil(value)


Slots = Callable[[float, Count, int, int], Count]
"""The capacity of an expert, from a factor, the number of tokens, E and k."""
Priority = Literal["position", "choice", "batch", "score"]
Overflow = Literal["zero", "renormalize", "next"]
Per = Literal["batch", "sequence", "prefix"] | int


def limit(
    routing: Assignment,
    slots: Count,
    *,
    priority: Priority = "position",
    overflow: Overflow = "zero",
    per: Per = "batch",
) -> Assignment:
    """Keep at most `slots` rows per expert; dropped rows are removed from the decision.

    Args:
        routing: a decision with one weight per row.
        slots: capacity of each expert in rows, see `per_token`, `per_choice` and `double` for the usual formulas; per
            sequence or group of these it may be one number for each, as a list or tensor, for those that are longer
            have more; per prefix it is one number for every length, from 1 on.
        priority: which rows are kept: the earliest tokens (`position`), all first choices before any second choice and
            then the earliest (`choice`; GShard), all first choices before any second and then the tokens with the
            largest weight of their own (`batch`; V-MoE's batch priority), or the largest weights (`score`).
        overflow: `zero` leaves the other weights of a token as they are, `renormalize` scales them to the old sum.
            `next` offers every row that was dropped to the next best expert of its token, in rounds, until one has
            free or all have been tried (No-Token-Left-Behind; Switch, appendix B); in every round rows are placed in
            the order of `priority`. Its weight w changes as the score does, to w · s_new / s_old: right for weights in
            proportion to the scores.
        per: whether slots are for all rows of an expert, those of each sequence or image (`sequence`; mesh), those of
            so many sequences or images one after the other (a number; V-MoE's groups have 8 images), or those up to a
            token in its sequence (`prefix`): then what is kept of a token depends on no later one, while the slots of a
            batch, group or sequence grow with the number of its tokens.

    Raises:
        ValueError: fewer than one slot, or sequence in a group; several weights per row; `next` without all scores, or
            not per batch; a sequence that is not known, not per batch; per prefix by a priority other than position.
    """
    each = list(slots) if isinstance(slots, Sequence) else [slots]
    numbers = [number for number in each if isinstance(number, int)]
    if numbers and min(numbers) < 1:
        raise ValueError(f"a capacity of {min(numbers)} slots drops every token; give each expert at least one slot")
    if routing.has_gate_axis:
        raise ValueError(
            f"a capacity needs one weight per row to say which rows matter, and this router gave "
            f"{routing.weight[0].numel()} gates; leave the capacity out"
        )
    if isinstance(per, int) and per < 1:
        raise ValueError(f"a group of {per} sequences holds no token; let at least one sequence share the slots")
    if per == "prefix" and priority != "position":
        raise ValueError(f"slots per prefix are given by position, not by {priority!r}; leave out priority, or per")
    turns = _by_priority(routing, priority)
    if overflow == "next":
        if per != "batch":
            raise ValueError(
                f"overflow='next' looks for free slots in the whole batch; it cannot be limited with per={per!r}"
            )
        return _reassign(routing, each[0], turns)
    if per == "batch":
        kept = _place(routing.expert, turns) < each[0]
    else:
        group, tokens = group_of_rows(routing, per)
        place = _place(routing.expert * tokens.shape[0] + group, turns)
        free = slots if isinstance(slots, Tensor) else torch.tensor(each, device=group.device)
        kept = place < (free[_position_of_rows(routing)] if per == "prefix" else free.expand(tokens.shape[0])[group])
    served = routing.only(kept)
    return served if overflow == "zero" else served.with_weight_sums_of(routing)


def dropped(routing: Assignment) -> tuple[float, float]:
    """The share of the assigned rows that a capacity dropped, and the share of the routed tokens without any row."""
    rows = len(routing.source) / max(1, int(routing.assigned.sum()))
    return 1 - rows, 1 - len(routing.source.unique()) / max(1, routing.tokens)


def _by_priority(routing: Assignment, priority: Priority) -> Int[Tensor, "R"]:
    """The rows in the order in which they get slots."""
    if priority == "position":
        return routing.source.sort(stable=True).indices
    best = -routing.weight.detach()
    if priority == "score":
        return best.sort(stable=True).indices
    if routing.rank is None:
        raise ValueError(
            f"priority={priority!r} needs a decision that knows which choice each row is; build it by `assign`"
        )
    if priority == "choice":
        return routing.rank.sort(stable=True).indices
    turns = _best_of_token(routing, best).sort(stable=True).indices
    return turns[routing.rank[turns].sort(stable=True).indices]


def _best_of_token(routing: Assignment, values: Float[Tensor, "R"]) -> Float[Tensor, "R"]:
    """For each row, the smallest value among the rows of its token."""
    source = routing.source
    if torch.compiler.is_exporting():  # OpenVINO has no scatter_reduce
        order = values.sort(stable=True).indices
        order = order[source[order].sort(stable=True).indices]
        return values[order[torch.searchsorted(source[order], source)]]
    smallest = values.new_zeros(math.prod(routing.shape))
    return smallest.scatter_reduce(0, source, values, reduce="amin", include_self=False)[source]


def group_of_rows(routing: Assignment, per: Per) -> tuple[Int[Tensor, "R"], Int[Tensor, "B"]]:
    """The group of each row, counted from 0 among those that have tokens, and how many tokens each of these has.

    A group is `per` sequences, where this is a number, and else one sequence.

    Raises:
        ValueError: the decision does not hold the sequence of every token that it routed.
    """
    if routing.sequence_id is None or routing.sequence_id.shape[0] != routing.tokens:
        raise ValueError("a capacity per sequence needs a decision that knows the sequence of every token it routed")
    sequences = per if isinstance(per, int) else 1
    group = routing.sequence_id // sequences
    if torch.compiler.is_exporting():  # the number of groups must follow from shapes, so some have no token
        groups = torch.arange(routing.shape[0], device=group.device)
        return group[_decision_of_rows(routing)], (group.unsqueeze(1) == groups).sum(0)
    _, group, tokens = group.unique(return_inverse=True, return_counts=True)
    return group[_decision_of_rows(routing)], tokens


def _position_of_rows(routing: Assignment) -> Int[Tensor, "R"]:
    """The position, from 0, of the token of each row among the tokens of its sequence."""
    sequence = routing.sequence_id
    assert sequence is not None  # `group_of_rows` requires it
    order = torch.arange(sequence.shape[0], device=sequence.device)
    return _place(sequence, order)[_decision_of_rows(routing)]


def _place(expert: Int[Tensor, "R"], turns: Int[Tensor, "R"]) -> Int[Tensor, "R"]:
    """Each row's place in the queue of its expert (or sequence), 0 for the first that gets a slot."""
    served = turns[expert[turns].sort(stable=True).indices]
    queue = torch.arange(served.shape[0], device=served.device)
    first = torch.searchsorted(expert[served], expert[served])
    return torch.empty_like(served).scatter(0, served, queue - first)


def _reassign(routing: Assignment, slots: int, turns: Int[Tensor, "R"]) -> Assignment:
    scores = routing.scores
    if scores is None or len(scores) != routing.tokens:
        raise ValueError("overflow='next' needs a router that scores all experts for every token")
    token = _decision_of_rows(routing)
    expert_of, best_first = routing.expert, scores.detach().sort(dim=-1, descending=True, stable=True).indices
    tried = torch.zeros_like(scores, dtype=torch.bool)
    tried[token, expert_of] = True
    served = _place(expert_of, turns) < slots
    for _ in range(scores.shape[1]):
        waiting = turns[~served[turns]]
        untried = best_first[~tried.gather(1, best_first)]  # token after token
        left = (~tried).sum(1)
        turn = _place(token[waiting], torch.arange(len(waiting), device=waiting.device))  # a token may be queued twice
        has_left = turn < left[token[waiting]]
        waiting, turn = waiting[has_left], turn[has_left]
        if len(waiting) == 0:
            break
        expert = untried[(left.cumsum(0) - left)[token[waiting]] + turn]
        expert_of = expert_of.scatter(0, waiting, expert)
        tried[token[waiting], expert] = True
        free = slots - expert_of[served].bincount(minlength=scores.shape[1])
        found = _place(expert, torch.arange(len(expert), device=expert.device)) < free[expert]
        served = served.scatter(0, waiting, found)
    kept = served.nonzero().squeeze(1)
    kept = kept[routing.source[kept].sort(stable=True).indices]
    kept = kept[expert_of[kept].sort(stable=True).indices]
    new, old = scores[token[kept], expert_of[kept]], scores[token[kept], routing.expert[kept]]
    moved = expert_of[kept] != routing.expert[kept]
    ratio = torch.where(moved, new / torch.where(moved, old, 1.0), 1.0)
    served_rows = routing.only(kept, counts=expert_of[kept].bincount(minlength=scores.shape[1]))
    return replace(served_rows, weight=served_rows.weight * ratio, expert_outputs=None)  # of the experts chosen first


def _decision_of_rows(routing: Assignment) -> Int[Tensor, "R"]:
    """Which of the routed tokens each row reads."""
    if torch.compiler.is_exporting() and routing.choices is not None:  # every routed token has rows
        has_rows = routing.source.new_zeros(math.prod(routing.shape)).scatter(0, routing.source, 1)
        return (has_rows.cumsum(0) - 1)[routing.source]
    if routing.tokens == math.prod(routing.shape):
        return routing.source
    positions, token = routing.source.unique(return_inverse=True)
    if len(positions) != routing.tokens:
        raise ValueError("some routed tokens have no expert, so it is not known which of the tokens these are")
    return token
