"""Parts of the sparse layer in standard operators, for `torch.export` to programs such as ONNX Runtime."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


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


def multiply_by_expert(
    rows: Float[Tensor, "R D"], weight: Float[Tensor, "E O D"], counts: Int[Tensor, "E"]
) -> Float[Tensor, "R O"]:
    """Every row times the transposed weight of its expert: each expert finds its rows and multiplies them."""
    expert = expert_of_rows(counts, rows.shape[0])
    out = rows.new_zeros(rows.shape[0], weight.shape[1])
    for e, matrix in enumerate(weight):
        own = (expert == e).nonzero().squeeze(1)
        out = out.index_copy(0, own, F.linear(rows[own], matrix))
    return out
