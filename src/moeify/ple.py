"""PLE (progressive layered extraction): stacked levels in which tasks have experts of their own and share others."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jaxtyping import Float
from torch import Tensor, nn

from moeify.context import Context
from moeify.experts.base import Experts
from moeify.experts.of_inputs import OfInputs
from moeify.moe import MoE
from moeify.routers.extraction import Extraction


class PLE(nn.Module):
    """every input of the first level is x; y_1 .. y_n, y_s of a level are x_1 .. x_n, x_s of the next.

    Args:
        levels: sparse layers whose routers are `Extraction`s for the same tasks, the last without a shared gate.
        tasks: n.
    """

    def __init__(self, levels: Iterable[MoE], tasks: int) -> None:
        super().__init__()
        self.levels, self.tasks = nn.ModuleList(levels), tasks

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... n O"]:
        """The features of every task, for towers to read."""
        y = x.unsqueeze(-2).expand(*x.shape[:-1], self.tasks + 1, -1)
        for level in self.levels:
            y = level(y.flatten(-2))
        return y

    def extra_repr(self) -> str:
        """The number of tasks."""
        return f"tasks={self.tasks}"


def ple(
    width: int,
    width_out: int,
    experts: Callable[[int, int], Experts],
    *,
    tasks: int,
    levels: int = 2,
    private: int = 1,
    shared: int = 1,
    context: Context | None = None,
) -> PLE:
    """A `PLE` of levels with the same number of experts (RecSys 2020, doi 10.1145/3383313.3412236).

    Args:
        width: D of x.
        width_out: O of the experts, and D of every level but the first.
        experts: makes experts from their number and the width that they read: `partial(FFN, hidden=64, width_out=32)`.
        tasks: n.
        levels: L; one level is CGC, which is a `moeify.routers.MultiGate` with `private` experts.
        private: experts of each task.
        shared: experts of all tasks.
        context: what the model was called with.

    Raises:
        ValueError: no level, or as of `Extraction`.
    """
    if levels < 1:
        raise ValueError(f"{levels} levels have no experts; choose at least one")
    context = Context() if context is None else context
    count, inputs = tasks * private + shared, tasks + 1
    reads = [task for task in range(tasks) for _ in range(private)] + [tasks] * shared

    def level(number: int) -> MoE:
        read = width if number == 0 else width_out
        has_next = number < levels - 1
        router = Extraction(inputs * read, count, tasks=tasks, private=private, shared_gate=has_next)
        return MoE(router, OfInputs(experts(count, read), reads, inputs), context=context)

    return PLE([level(number) for number in range(levels)], tasks)
