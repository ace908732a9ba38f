"""The exchange of rows between processes: each sends some to every other, and gradients travel back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

SHARE = 4
"""The most rows that a process receives at once, in units of what it received if all experts had equally many."""

Plan = Int[Tensor, "ranks ranks held"]
"""How many rows every process sends to every other, by the expert there; on the host."""


class Exchange(torch.autograd.Function):
    """An all-to-all of rows with a size for every process; the gradient goes the other way, times a constant.

    It waits for the rows; the functional collectives of torch return before.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, receive: list[int], send: list[int], group: Any, gradient_scale: float = 1.0
    ) -> Tensor:
        """The rows that this process receives, those of the first process first."""
        ctx.back = send, receive, group, gradient_scale
        return exchanged(rows, receive, send, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        """The gradient of every row, where the row came from."""
        *sizes_and_group, scale = ctx.back
        back = exchanged(gradient, *sizes_and_group)
        return back if scale == 1 else back.mul_(scale), None, None, None, None


def exchanged(rows: Tensor, receive: list[int], send: list[int], group: Any) -> Tensor:
    """The rows, or other slices, that this process receives from every process when it sends as many to each."""
    got = rows.new_empty(sum(receive), *rows.shape[1:])
    distributed.all_to_all_single(got, rows.contiguous(), receive, send, group=group)
    return got


def by_slot(
    counts: Int[Tensor, "E"], slots: Int[Tensor, "slots"], turn: int = 0
) -> tuple[Int[Tensor, "R"], Int[Tensor, "slots"]]:
    """The rows in the order of slots, each with an expert, and the rows of every slot; they were sorted by expert.

    Args:
        counts: rows of every expert.
        slots: the expert in each slot; the slots of one expert get equally many of its rows, up to one.
        turn: which slot of an expert comes first where rows are left, so that processes choose different ones.
    """
    same = slots[:, None] == slots
    copies = same.sum(1)
    nth = (same.tril(-1).sum(1) + turn) % copies
    of_expert = counts[slots]
    left = of_expert % copies
    per_slot = of_expert // copies + (nth < left)
    first = (counts.cumsum(0) - counts)[slots] + nth * (of_expert // copies) + torch.minimum(nth, left)
    shift = (first - (per_slot.cumsum(0) - per_slot)).repeat_interleave(per_slot)
    return shift + torch.arange(len(shift), device=counts.device), per_slot


def returned(outputs: Float[Tensor, "R O"], order: Int[Tensor, "R"]) -> Float[Tensor, "R O"]:
    """Outputs of rows that were taken in an order, in the order that the rows had before."""
    return torch.empty_like(outputs).index_copy(0, order, outputs)


def planned(counts: Int[Tensor, "slots"], ranks: int, group: Any) -> Plan:
    """The plan of a layer from the rows that this process sends; the layer's one synchronisation with the host."""
    table = counts.new_empty(ranks, len(counts))
    distributed.all_gather(list(table.unbind()), counts.contiguous(), group=group)
    return table.cpu().view(ranks, ranks, -1)


def in_rounds(
    rows: Float[Tensor, "R D"], plan: Plan, rank: int, limit: int | None, one: Callable[[Tensor, Plan], Tensor]
) -> Float[Tensor, "R O"]:
    """Exchange and compute at once if no process then receives more rows than a limit, else in several rounds.

    The backward pass computes every one of several rounds again, so memory is that of one.

    Args:
        rows: of this process, sorted by slot.
        plan: of all processes.
        rank: of this process in the plan.
        limit: rows that a process may receive at once; by default `SHARE` times what it received if all experts had
            equally many. A process that sends to another sends at least one row.
        one: computes one round.
    """
    sent = plan.sum(-1)
    limit = limit or SHARE * -(-int(plan.sum()) // len(plan))
    if int(sent.sum(0).max()) <= limit:
        return one(rows, plan)
    each = max(1, limit // len(plan))
    end = plan.cumsum(-1)
    parts: list[list[Tensor]] = [[] for _ in plan]
    mine = rows.split(sent[rank].tolist())
    for first in range(0, int(sent.max()), each):
        now = end.clamp(max=first + each) - (end - plan).clamp(min=first)  # what lies in [first, first + each)
        now = now.clamp(min=0)
        chosen = torch.cat([part[first : first + each] for part in mine])
        y = checkpoint(one, chosen, now, use_reentrant=False) if torch.is_grad_enabled() else one(chosen, now)
        for to, part in enumerate(y.split(now[rank].sum(-1).tolist())):
            parts[to].append(part)
    return torch.cat([part for to in parts for part in to])
