"""The base class of experts: a module from rows sorted by expert to rows of expert outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.kernels.stacked import Activation, Stacked


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

    def all_outputs(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T E O"]:
        """The output of every expert for every token."""
        counts = torch.full((self.num_experts,), len(x), dtype=torch.int64, device=x.device)
        return self(x.repeat(self.num_experts, 1), counts).unflatten(0, (self.num_experts, -1)).transpose(0, 1)


def hold_activation(module: nn.Module, activation: Activation) -> None:
    """Let a module have the parameters of its activation as its own, if there are any (PReLU, xIELU), as `act`."""
    act = getattr(activation, "act", None)
    if isinstance(act, nn.Module) and next(act.parameters(), None) is not None:
        module.add_module("act", act)
