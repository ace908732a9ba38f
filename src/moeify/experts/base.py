"""The base class of experts: a module from rows sorted by expert to rows of expert outputs."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moeify.kernels.stacked import Activation, Stacked

ExpertsT = TypeVar("ExpertsT", bound="Experts")


class Experts(nn.Module, ABC):
    """The E experts of a layer, computed together.

    Attributes:
        num_experts: E.
    """

    num_experts: int

    @property
    def costs(self) -> Float[Tensor, "E"]:
        """The cost of a row at each expert, relative to the most expensive; read by `moeify.losses.cost`."""
        return torch.ones(self.num_experts)

    @property
    def stacked(self) -> Stacked | None:
        """The weights of all experts, for kernels that run whole experts; None for experts that are not plain FFNs."""
        return None

    def called_modules(self) -> Iterable[nn.Module]:
        """The modules that a call of the experts calls; a kernel that reads their weights does not run their hooks."""
        return self.modules()

    def common_modules(self) -> Iterable[nn.Module]:
        """The modules that every row passes, whichever expert it is sent to: by default none."""
        return ()

    def per_token_modules(self) -> Iterable[nn.Module]:
        """Those of `common_modules` that every token passes once, however many experts it has: by default none."""
        return ()

    @abstractmethod
    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """Compute `counts[0]` rows by the first expert, the next `counts[1]` by the second, and so on."""

    def part(self, first: int, last: int) -> Experts:
        """The experts `first` to `last - 1` alone, with tensors of their own, for a process that holds only these.

        Raises:
            ValueError: by default always; experts whose tensors are (E, ...) return `cut(self, first, last)`.
        """
        raise ValueError(
            f"{type(self).__name__} cannot be divided among processes, for it does not define `part`; keep these "
            "experts whole in every process (ep=1), under DDP or FSDP"
        )

    def all_outputs(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E O"]:
        """The output of every expert for every token."""
        counts = torch.full((self.num_experts,), x.shape[0], dtype=torch.int64, device=x.device)
        return self(x.repeat(self.num_experts, 1), counts).unflatten(0, (self.num_experts, -1)).transpose(0, 1)


def cut(experts: ExpertsT, first: int, last: int) -> ExpertsT:
    """A copy of experts with rows `first` to `last - 1` of all tensors, but not of `common_modules`, which it shares.

    Raises:
        ValueError: a tensor is not (E, ...), or experts are trained as slices of a stack.
    """
    copied: dict[int, Any] = {id(module): module for module in experts.common_modules()}

    def visit(module: nn.Module) -> None:
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{type(experts).__name__} has parametrised weights, such as experts that are trained as slices, and "
                "cannot be divided among processes; call moeify.experts.slices.join_experts(model) first"
            )
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if tensor.dim() == 0 or len(tensor) != experts.num_experts:
                raise ValueError(
                    f"{name} of {type(experts).__name__} has the shape {tuple(tensor.shape)}, and tensors of "
                    f"{experts.num_experts} experts that are divided have one part per expert; name modules that "
                    "all share in `common_modules`"
                )
            own = tensor.detach()[first:last].clone()
            copied[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
        for child in module.children():
            if isinstance(child, Experts):
                copied[id(child)] = child.part(first, last)
            elif id(child) not in copied:
                visit(child)

    visit(experts)
    part = copy.deepcopy(experts, copied)
    part.num_experts = last - first
    return part


def hold_activation(module: nn.Module, activation: Activation) -> None:
    """Let a module have the parameters of its activation as its own, if there are any (PReLU, xIELU), as `act`."""
    act = getattr(activation, "act", None)
    if isinstance(act, nn.Module) and next(act.parameters(), None) is not None:
        module.add_module("act", act)
