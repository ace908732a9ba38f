"""Parts of the sparse layer in standard operators, for `torch.export` to programs such as ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Group = Callable[[Tensor, Tensor], Tensor]
"""Several experts: from their rows and the counts of these to their outputs."""


def expert_of_rows(counts: Int[Tensor, "E"], num_rows: int) -> Int[Tensor, "R"]:
    """The expert of every row, of rows sorted by expert.

    Args:
        counts: rows of each expert.
        num_rows: their sum, R.
    """
    if not torch.compiler.is_exporting():
        return torch.repeat_interleave(counts, output_size=num_rows)
    row = torch.arange(num_rows, device=counts.device)
    return (row.unsqueeze(1) >= counts.cumsum(0)).sum(1)


def repeat_for_rows(values: Float[Tensor, "E *V"], counts: Int[Tensor, "E"], num_rows: int) -> Float[Tensor, "R *V"]:
    """The value of every row's expert, of rows sorted by expert."""
    if not torch.compiler.is_exporting():
        return torch.repeat_interleave(values, counts, dim=0, output_size=num_rows)
    return values[expert_of_rows(counts, num_rows)]


def apply_by_group(
    rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"], groups: Iterable[tuple[int, Group]]
) -> Float[Tensor, "R O"]:
    """What groups of adjacent experts make of their rows: each finds its own.

    Args:
        rows: sorted by expert.
        counts: rows of each expert.
        groups: how many experts each has, and its output for its rows and their counts.
    """
    expert, first, outputs = expert_of_rows(counts, rows.shape[0]), 0, []
    for size, group in groups:
        inside = expert == first if size == 1 else (expert >= first) & (expert < first + size)
        own = inside.nonzero().squeeze(1)
        outputs.append((own, group(rows[own], counts[first : first + size])))
        first += size
    out = rows.new_zeros(rows.shape[0], outputs[0][1].shape[1])
    for own, output in outputs:
        out = out.index_copy(0, own, output)
    return out


def is_thin(weight: Float[Tensor, "E O D"]) -> bool:
    """Whether a matrix of an expert is hardly larger than a row (experts of one hidden unit, PEER)."""
    return min(weight.shape[1:]) <= 4


def multiply_by_expert(
    rows: Float[Tensor, "R D"], weight: Float[Tensor, "E O D"], counts: Int[Tensor, "E"]
) -> Float[Tensor, "R O"]:
    """Every row times the transposed weight of its expert: each expert finds its rows and multiplies them.

    Of thin matrices every row has a copy instead, since there may be a thousand of them.
    """
    expert = expert_of_rows(counts, rows.shape[0])
    if is_thin(weight):
        return torch.bmm(weight[expert], rows.unsqueeze(2)).squeeze(2)
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    for e, matrix in enumerate(weight):
        own = (expert == e).nonzero().squeeze(1)
        out = out.index_copy(0, own, F.linear(rows[own], matrix))
    return out
