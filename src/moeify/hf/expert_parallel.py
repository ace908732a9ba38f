"""Expert parallelism of transformers with moeify's dispatch: `DistributedConfig(ep_implementation="moeify")`.

Imported once transformers' own `expert_parallel` is, which needs torch.distributed.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import AllToAllEP

from moeify.context import Context
from moeify.experts import Experts
from moeify.experts.exchange import Exchange, Plan, by_slot, in_rounds, planned, returned
from moeify.experts.shadows import Lent, Shadows
from moeify.hf.interface import rows_of_choices
from moeify.hf.names import EXPERT_PARALLEL


class RowsToExperts(AllToAllEP):
    """Sends every process's rows to the processes of their experts, and their outputs back; registered as `moeify`.

    Experts of moeify are called with rows sorted by expert and their counts, so whatever their router decided holds:
    padding and rows that a capacity dropped are not sent. Experts of transformers are called with tokens, index and
    weights; a padded token of a model that `moeify.parallel.distribute` placed is not sent either, and its output is 0.
    Processes of one tensor-parallel group hold the same tokens, and each sends its part of the rows.

    Experts of moeify keep the number of all experts in `num_experts`, which routers and statistics read.

    Attributes:
        context: which tokens are real, for experts of transformers.
        slots: the expert in each of all slots, as of `moeify.parallel.Parallel`.
        shadows: which experts other processes compute too, as of `moeify.parallel.Parallel`.
        limit: rows that a process may receive at once, as of `moeify.parallel.Parallel`; None for 4 times its share.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.context: Context | None = None
        self.slots: Int[Tensor, "E"] | None = None
        self.shadows: Shadows | None = None
        self.limit: int | None = None
        self.experts = experts
        held: Any = experts.num_experts
        self.num_local_experts, self.num_experts = held, int(held * ep_mesh.size())
        if isinstance(experts, Experts):
            experts.num_experts = self.num_experts
            experts.register_forward_pre_hook(_as_three)
        setattr(experts, EXPERT_PARALLEL, self)

    def __call__(
        self,
        hidden_states: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"] | None,
    ) -> Float[Tensor, "T D"]:
        """The weighted outputs of the tokens of this process; without weights, those of rows by their counts."""
        if top_k_weights is None:
            return self._exchanged(hidden_states, top_k_index)
        positions = None if self.context is None else self.context.real(len(top_k_index))
        routing = rows_of_choices(top_k_index, top_k_weights, self.num_experts, positions)
        outputs = self._exchanged(routing.dispatch(hidden_states), routing.counts)
        return routing.combine(outputs).to(hidden_states.dtype)

    def _exchanged(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """The outputs of rows sorted by expert, in the same order."""
        slots = self.slots if self.shadows is None else self.shadows.slots
        if slots is None:
            return self._by_slot(rows, counts)
        order, counts = by_slot(counts, slots.to(counts.device), self.ep_mesh.get_local_rank())
        return returned(self._by_slot(rows[order], counts), order)

    def _by_slot(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "slots"]) -> Float[Tensor, "R O"]:
        """The outputs of rows sorted by slot, in the same order."""
        if self.tp_mesh.size() == 1:
            return self._of_rank(rows, counts)
        total, part = len(rows), -(-len(rows) // self.tp_mesh.size())
        first = min(part * self.tp_mesh.get_local_rank(), total)
        edges = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).clamp(first, min(first + part, total))
        shared = DTensor.from_local(rows, self.tp_mesh, [Replicate()], run_check=False)
        mine = shared.redistribute(self.tp_mesh, [Shard(0)]).to_local()
        outputs = self._of_rank(mine, edges.diff()).contiguous()
        width = outputs.shape[-1]
        whole = DTensor.from_local(
            outputs, self.tp_mesh, [Shard(0)], shape=torch.Size((total, width)), stride=(width, 1)
        )
        return whole.full_tensor()

    def _of_rank(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """The outputs of rows that this process alone sends."""
        plan = planned(counts, self.ep_mesh.size(), self.ep_mesh.get_group())
        return in_rounds(rows, plan, self.ep_mesh.get_local_rank(), self.limit, self._round)

    def _round(self, rows: Float[Tensor, "r D"], plan: Plan) -> Float[Tensor, "r O"]:
        """Exchange rows, compute those that arrived, and exchange their outputs."""
        rank, group = self.ep_mesh.get_local_rank(), self.ep_mesh.get_group()
        theirs = plan[:, rank]
        send, receive = plan[rank].sum(-1).tolist(), theirs.sum(-1).tolist()
        got = Exchange.apply(rows, receive, send, group)
        expert = torch.arange(theirs.shape[1]).repeat(len(plan)).repeat_interleave(theirs.flatten())
        expert, per_expert = (t.to(rows.device, non_blocking=True) for t in (expert, theirs.sum(0)))
        # The backward pass repeats a round outside of transformers' forward, where parameters are distributed.
        with _local_parameters(self.experts), _with_lent(self.experts, self.shadows):
            outputs = self._local(got, expert, per_expert)
        return Exchange.apply(outputs, send, receive, group)  # pyrefly: ignore

    def _local(
        self, rows: Float[Tensor, "R D"], expert: Int[Tensor, "R"], counts: Int[Tensor, "local"]
    ) -> Float[Tensor, "R O"]:
        """The outputs of this process's experts; one row that is not kept where there is none, to stay in the graph."""
        none = len(rows) == 0
        if none:
            rows, expert = rows.sum(0, keepdim=True), expert.new_zeros(1)
            counts = torch.cat([counts.new_ones(1), counts[1:]])
        if isinstance(self.experts, Experts):
            order = expert.argsort(stable=True)
            slots = self.slots if self.shadows is None else self.shadows.slots
            first = self.ep_mesh.get_local_rank() * len(counts)
            here = slice(first, first + len(counts))
            with _local_buffers(self.experts, self.num_experts, here if slots is None else slots[here]):
                sorted_outputs = self.experts_forward(rows[order], counts)
            outputs = returned(sorted_outputs, order)
        else:
            outputs = self.experts_forward(rows, expert.unsqueeze(-1), rows.new_ones(len(rows), 1))
        return outputs[:0] if none else outputs


def implementation_of(experts: nn.Module) -> RowsToExperts | None:
    """How the experts of a module get their rows, None where they are not parallel, or not by moeify."""
    return getattr(experts, EXPERT_PARALLEL, None)


def _as_three(module: nn.Module, args: tuple) -> tuple:
    """Experts of moeify are called with two arguments, and what transformers puts into them takes three."""
    return (*args, None) if len(args) == 2 else args


@contextmanager
def _local_parameters(experts: nn.Module) -> Generator[None]:
    """Let experts see the local parts of parameters that are still distributed."""
    whole = {name: p for name, p in experts._parameters.items() if isinstance(p, DTensor)}
    local: Any = {name: p.to_local() for name, p in whole.items()}
    experts._parameters.update(local)
    try:
        yield
    finally:
        experts._parameters.update(whole)


@contextmanager
def _with_lent(experts: nn.Module, shadows: Shadows | None) -> Generator[None]:
    """Let the weights of shadows stand behind the local ones of experts, and experts count them."""
    if shadows is None:
        yield
        return
    own, number = dict(experts._parameters), experts.num_experts
    stacks = {name: p for name, p in own.items() if p is not None}
    longer: Any = dict(zip(stacks, Lent.apply(shadows, *stacks.values()), strict=True))  # pyrefly: ignore
    experts._parameters.update(longer)
    if not isinstance(experts, Experts):
        experts.num_experts = number + shadows.spare  # pyrefly: ignore
    try:
        yield
    finally:
        experts._parameters.update(own)
        experts.num_experts = number


@contextmanager
def _local_buffers(experts: nn.Module, num_experts: int, here: slice | Int[Tensor, "local"]) -> Generator[None]:
    """Give experts the part of their buffers (E, ...) that belongs to those of this process."""
    whole = {
        name: buffer
        for name, buffer in experts._buffers.items()
        if buffer is not None and buffer.dim() > 0 and len(buffer) == num_experts
    }
    experts._buffers.update({name: buffer[here] for name, buffer in whole.items()})
    try:
        yield
    finally:
        experts._buffers.update(whole)
