"""Shadows of hot experts: other processes compute some of their rows too, with weights that are lent for one pass.

An expert's own process sends its weights when the layer is called and gets their gradients back, as in FasterMoE (He et
al., PPoPP 2022, dynamic shadowing). So there is one copy of the parameters and of the optimizer's state, and no two
copies that could drift apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moeify.experts.exchange import exchanged


@dataclass(frozen=True, eq=False)
class Shadows:
    """Which experts a group of processes lends to whom.

    Attributes:
        slots: the expert in each slot of all processes: their own experts, then their shadows.
        spare: shadows of each process.
        sent: the own experts that this process lends, by the process that gets them.
        send: how many it lends to each process.
        arrived: which of its shadows this process gets, by the process that lends them.
        receive: how many it gets from each process.
        group: the processes.
    """

    slots: Int[Tensor, "slots"]
    spare: int
    sent: Int[Tensor, "lent"]
    send: list[int]
    arrived: Int[Tensor, "spare"]
    receive: list[int]
    group: Any

    @classmethod
    def of(cls, held: Int[Tensor, "ranks slots"], own: int, rank: int, group: Any) -> Shadows:
        """Those of a process.

        Args:
            held: the expert in each slot of each process.
            own: how many of the slots of a process are its own experts, the first ones.
            rank: of this process.
            group: the processes.
        """
        slot = held[:, :own].flatten().argsort()[held[:, own:]]  # (processes, spare)
        lender, place = slot // own, slot % own
        to_each = [place[to][lender[to] == rank] for to in range(len(held))]
        of_each = [(lender[rank] == of).nonzero()[:, 0] for of in range(len(held))]
        return cls(
            slots=held.flatten(), spare=held.shape[1] - own, group=group,
            sent=torch.cat(to_each), send=[len(part) for part in to_each],
            arrived=torch.cat(of_each), receive=[len(part) for part in of_each],
        )  # fmt: skip


class Lent(torch.autograd.Function):
    """Stacks of this process's experts, each with the experts appended that others lend; their gradients return."""

    @staticmethod
    def forward(ctx: Any, shadows: Shadows, *stacks: Tensor) -> tuple[Tensor, ...]:
        """Send and receive what is lent; stacks of integers, of quantised weights, have no gradient."""
        ctx.shadows = shadows
        s, longer = shadows, []
        for stack in stacks:
            got = exchanged(stack[s.sent.to(stack.device)], s.receive, s.send, s.group)
            longer.append(torch.cat([stack, torch.empty_like(got).index_copy_(0, s.arrived.to(got.device), got)]))
        ctx.mark_non_differentiable(*(t for t in longer if not t.is_floating_point()))
        return tuple(longer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        """Add the gradients of what was lent to those of the own experts."""
        s, found = ctx.shadows, []
        for needed, gradient in zip(ctx.needs_input_grad[1:], gradients, strict=True):
            if not needed:
                found.append(None)
                continue
            own, lent = gradient.split([len(gradient) - s.spare, s.spare])
            back = exchanged(lent[s.arrived.to(lent.device)], s.send, s.receive, s.group)
            found.append(own.index_add(0, s.sent.to(own.device), back))
        return None, *found
