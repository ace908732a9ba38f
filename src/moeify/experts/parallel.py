"""Expert parallelism: every process holds some of the experts, and rows travel to their expert and back."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from moeify.experts.base import Experts
from moeify.experts.exchange import Exchange, by_slot, in_rounds, planned, returned
from moeify.experts.latent import Latent
from moeify.experts.shadows import Lent, Shadows


class Parallel(Experts):
    """Experts of which every process of a group holds E / ranks, one range after the other (GShard, arXiv 2006.16668).

    Rows go to the process of their expert, are computed there, and return: two exchanges forward, two backward, and one
    of counts, whose sizes are read on the host once. Any router works; what it decides of one batch it decides of the
    batch of this process. All processes must call the layer equally often, forward and backward, be it without rows.

    A process never receives more than `limit` rows at once. Where more are sent to it, all processes exchange and
    compute in several rounds, and training computes each round again in the backward pass, so that memory is bounded
    even where all tokens choose one expert.

    Gradients of the weights are means over the group, as those that DDP and FSDP average: reduce them over the other
    processes that hold the same experts only. Parameters that all experts share, such as those of an activation, are
    in every process, and their gradient is summed over the group by itself.

    Args:
        experts: all E experts, the same in every process; what this process holds of stacked tensors is copied.
        group: the processes; by default all.
        limit: rows that a process may receive at once, the same in every process; by default `SHARE` times what it
            received if all experts had equally many. A process that sends to another sends at least one row.

    Attributes:
        experts: those of this process.
        stacks: of each tensor that was cut, by its name in `experts`: its first size before.
        slots: the expert in each of all E slots, E / ranks consecutive ones in every process; None while they lie in
            their order. `moeify.parallel.move_experts` changes it together with the weights.
        shadows: which experts other processes compute too; None for none. `move_experts` sets it.

    Raises:
        ValueError: experts that cannot be divided, or not evenly; a limit below 1.
    """

    def __init__(self, experts: Experts, group: Any = None, *, limit: int | None = None) -> None:
        super().__init__()
        self.group = distributed.group.WORLD if group is None else group
        self.rank, self.ranks = distributed.get_rank(self.group), distributed.get_world_size(self.group)
        self.num_experts, self.limit = experts.num_experts, limit
        if self.num_experts % self.ranks:
            raise ValueError(
                f"{self.num_experts} experts cannot be divided evenly among {self.ranks} processes; choose a group "
                f"whose size divides {self.num_experts}"
            )
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} lets no row arrive; choose limit >= 1, or None")
        held = self.num_experts // self.ranks
        self._costs = experts.costs
        self.experts = experts if self.ranks == 1 else experts.part(self.rank * held, (self.rank + 1) * held)
        whole = dict(_tensors(experts))
        cut = [name for name, tensor in _tensors(self.experts) if tensor.shape != whole[name].shape]
        self.stacks = {name: len(whole[name]) for name in cut}
        self.slots: Int[Tensor, "E"] | None = None
        self.shadows: Shadows | None = None
        self._whole = [_without_memory(experts)]  # in a list, as it is no part of this module

    @property
    def whole(self) -> Experts:
        """All E experts as they were before they were divided, without memory (on the meta device)."""
        return self._whole[0]

    @property
    def costs(self) -> Float[Tensor, "E"]:
        """The cost of a row at each of all E experts, relative to the most expensive."""
        return self._costs

    def common_parameters(self) -> set[nn.Parameter]:
        """The parameters that every row passes, whichever expert it is sent to; every process has them."""
        modules = [m for part in self.experts.modules() if isinstance(part, Experts) for m in part.common_modules()]
        return {parameter for module in modules for parameter in module.parameters()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Parallel:
        memo[id(self.group)] = self.group  # a group of processes cannot be copied
        copied = memo[id(self)] = self.__class__.__new__(self.__class__)
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    @torch.compiler.disable
    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """Send every row to its expert, wherever it is, and return its output."""
        if self.ranks == 1:
            with self._local_weights():
                return self.experts(rows, counts)
        slots = self.slots if self.shadows is None else self.shadows.slots
        if slots is None:
            return self._exchanged(rows, counts)
        order, counts = by_slot(counts, slots.to(counts.device), self.rank)
        return returned(self._exchanged(rows[order], counts), order)

    def _exchanged(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "slots"]) -> Float[Tensor, "R O"]:
        """The outputs of rows sorted by slot."""
        plan = planned(counts, self.ranks, self.group)
        return in_rounds(rows, plan, self.rank, self.limit, self._round)

    def _round(self, rows: Float[Tensor, "r D"], plan: Int[Tensor, "ranks ranks held"]) -> Float[Tensor, "r O"]:
        """Exchange rows, compute those that arrived, and exchange their outputs."""
        send, theirs = plan[self.rank].sum(-1).tolist(), plan[:, self.rank]
        receive = theirs.sum(-1).tolist()
        got = Exchange.apply(rows, receive, send, self.group, float(self.ranks))  # by process, then by expert
        if theirs.shape[1] > 1:
            expert = torch.arange(theirs.shape[1]).repeat(self.ranks).repeat_interleave(theirs.flatten())
            order = expert.argsort(stable=True).to(rows.device, non_blocking=True)
            y = self._compute(got[order], theirs)
            y = returned(y, order)
        else:
            y = self._compute(got, theirs)
        return Exchange.apply(y, send, receive, self.group, 1 / self.ranks)

    def _compute(self, rows: Float[Tensor, "r D"], theirs: Int[Tensor, "ranks held"]) -> Float[Tensor, "r O"]:
        with self._local_weights() as lent:
            y = self.experts(rows, theirs.sum(0).to(rows.device, non_blocking=True))
        if not torch.is_grad_enabled():
            return y
        # Experts without rows, or without weights, may cut the graph, and the others would wait for this process.
        y = _Joined.apply(y, rows, *lent)
        return y if y.requires_grad else y.requires_grad_()

    @contextmanager
    def _local_weights(self) -> Generator[tuple[Tensor, ...]]:
        """Let the experts see their part of distributed weights as tensors, and sum the gradients of shared ones.

        Weights of shadows stand behind those of the own experts; the value is what was appended to.
        """
        common = self.common_parameters() if self.ranks > 1 else set()
        seen: dict[tuple[nn.Module, str], Tensor] = {}
        stacks = []
        for prefix, module in self.experts.named_modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is None:
                    continue
                value: Any = tensor
                local = value.to_local() if hasattr(value, "to_local") else value
                if tensor in common:
                    local = _Summed.apply(local, self.group)
                elif self.shadows is not None and f"{prefix}.{name}".lstrip(".") in self.stacks:
                    stacks.append((module, name))
                if local is not tensor or (module, name) in stacks:
                    seen[module, name] = local
        lent: tuple[Tensor, ...] = ()
        counted, spare = [], 0
        if self.shadows is not None:
            spare = self.shadows.spare
            lent = Lent.apply(self.shadows, *(seen[place] for place in stacks))  # pyrefly: ignore
            seen |= dict(zip(stacks, lent, strict=True))
            counted = [module for module in self.experts.modules() if isinstance(module, Experts)]
        for (module, name), value in seen.items():
            module.__dict__[name] = value
        for module in counted:
            module.num_experts += spare
        try:
            yield tuple(stack for stack in lent if stack.requires_grad)
        finally:
            for module, name in seen:
                del module.__dict__[name]
            for module in counted:
                module.num_experts -= spare

    def extra_repr(self) -> str:
        """Which experts this process holds."""
        held = self.num_experts // self.ranks
        if self.slots is not None:
            here = self.slots[self.rank * held : (self.rank + 1) * held].tolist()
            return f"experts {', '.join(map(str, here))} of {self.num_experts}"
        return f"experts {self.rank * held} to {(self.rank + 1) * held - 1} of {self.num_experts}"


def spread(experts: Experts, group: Any = None, *, limit: int | None = None) -> Experts:
    """The same experts divided among processes; of `Latent` those inside, so that rows travel at the latent width.

    Args:
        experts: all E experts, the same in every process.
        group: the processes; by default all.
        limit: as of `Parallel`.

    Raises:
        ValueError: as of `Parallel`.
    """
    if isinstance(experts, Latent):
        experts.experts = spread(experts.experts, group, limit=limit)
        return experts
    return Parallel(experts, group, limit=limit)


def _without_memory(experts: Experts) -> Experts:
    blank: dict[int, Any] = {}
    for _, tensor in _tensors(experts):
        shaped = tensor.detach().to("meta")
        blank[id(tensor)] = nn.Parameter(shaped, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shaped
    return copy.deepcopy(experts, blank)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


class _Joined(torch.autograd.Function):
    """The outputs, with rows and lent weights in their graph in any case; what it saves makes all processes repeat a
    round here."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, rows: Tensor, *lent: Tensor) -> Tensor:
        ctx.save_for_backward(rows[:0])
        ctx.size, ctx.lent = len(rows), [(stack.shape, stack.dtype) for stack in lent]
        return outputs.view_as(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        (none,) = ctx.saved_tensors
        of_rows = none.new_zeros(1, *none.shape[1:]).expand(ctx.size, *none.shape[1:])
        return gradient, of_rows, *(none.new_zeros((), dtype=dtype).expand(shape) for shape, dtype in ctx.lent)


class _Summed(torch.autograd.Function):
    """A tensor that every process has, whose gradient is the sum of those of all."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyrefly: ignore[bad-override]
        total = gradient.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=ctx.group)
        return total, None
