"""Heterogeneous experts: different types and sizes in one layer, identity and zero experts among them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.experts.base import Experts
from moeify.exportable import apply_by_group


class Each(Experts):
    """Arbitrary modules as experts, each called on its own rows.

    Args:
        modules: one module per expert, from (R, D) to (R, O).
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(modules)
        self.num_experts = len(self.experts)

    def part(self, first: int, last: int) -> Each:
        """The experts `first` to `last - 1` alone: the modules themselves, under the names that they have here."""
        part = Each([])
        for name, expert in list(self.experts.named_children())[first:last]:
            part.experts.add_module(name, expert)
        part.num_experts = last - first
        return part.train(self.training)

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """Call every expert, also those without rows, so that all stay in the autograd graph.

        Follows autocast; otherwise rows take the dtype of an expert's parameters, if these have one.
        """
        parts = rows.split(counts.tolist())
        return torch.cat([expert(_in_dtype_of(expert, part)) for expert, part in zip(self.experts, parts, strict=True)])


def _in_dtype_of(expert: nn.Module, rows: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
    dtypes = {parameter.dtype for parameter in expert.parameters() if parameter.is_floating_point()}
    return rows if len(dtypes) != 1 or torch.is_autocast_enabled(rows.device.type) else rows.to(dtypes.pop())


class Blocks(Experts):
    """Expert groups of different types as the experts of one layer: small and large ones, identity, zero.

    Args:
        groups: experts of the same output width.
    """

    def __init__(self, groups: Iterable[Experts]) -> None:
        super().__init__()
        groups = list(groups)
        self.banks = nn.ModuleList(groups)  # the name that saved weights have
        self._sizes = [group.num_experts for group in groups]
        self.num_experts = sum(self._sizes)

    @property
    def costs(self) -> Float[Tensor, "E"]:
        """The costs of a row at every expert, in proportion to its number of parameters."""
        work = torch.cat([_size(group) * group.costs for group in cast(Iterable[Experts], self.banks)])
        return work / work.max().clamp_min(1)

    def part(self, first: int, last: int) -> Blocks:
        """The experts `first` to `last - 1` alone: groups, or parts of them, under the names that they have here."""
        part, before = Blocks([]), 0
        for name, group in self.banks.named_children():
            size = cast(Experts, group).num_experts
            begin, end = max(first - before, 0), min(last - before, size)
            if begin < end:
                part.banks.add_module(name, group if end - begin == size else cast(Experts, group).part(begin, end))
                part._sizes.append(end - begin)
            before += size
        part.num_experts = last - first
        return part.train(self.training)

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """Give every group the rows of its experts."""
        if torch.compiler.is_exporting():
            return apply_by_group(rows, counts, zip(self._sizes, self.banks, strict=True))
        by_group = counts.split(self._sizes)
        parts = rows.split([int(c.sum()) for c in by_group])
        return torch.cat([group(part, c) for group, part, c in zip(self.banks, parts, by_group, strict=True)])


def _size(group: Experts) -> float:
    """The parameters of one of its experts."""
    return sum(p.numel() for p in group.parameters()) / group.num_experts


class Identity(Experts):
    """Experts whose output is their input (copy experts of MoE++, zero-computation experts of LongCat)."""

    def __init__(self, num_experts: int = 1) -> None:
        super().__init__()
        self.num_experts = num_experts

    @property
    def costs(self) -> Float[Tensor, "E"]:
        """Zero."""
        return torch.zeros(self.num_experts)

    def part(self, first: int, last: int) -> Identity:
        """As many of them."""
        return Identity(last - first)

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R D"]:
        """Return the rows."""
        return rows


class Zero(Experts):
    """Experts whose output is zero (zero experts of MoE++).

    Args:
        num_experts: E.
        width_out: O, if it differs from the width of the rows.
    """

    def __init__(self, num_experts: int = 1, width_out: int | None = None) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.width_out = width_out

    @property
    def costs(self) -> Float[Tensor, "E"]:
        """Zero."""
        return torch.zeros(self.num_experts)

    def part(self, first: int, last: int) -> Zero:
        """As many of them."""
        return Zero(last - first, self.width_out)

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """Return zeros."""
        return rows.new_zeros(rows.shape[0], self.width_out or rows.shape[1])
