"""Low-rank experts (LoRA) in Triton, `Σ w s B (A x)`: two grouped GEMMs and a weighted sum.

A row has only r elements between the two projections, so its top-k weight is applied there. The backward pass saves the
tokens and these rows, T·D + 2·R·r elements, and no (R, D) or (R, O) tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, library

from moeify.kernels.naive import naive_grouped_linear
from moeify.kernels.triton.combine import combine
from moeify.kernels.triton.linear import grouped_linear


def sparse_adapters(
    x: Float[Tensor, "T D"],
    down: Float[Tensor, "E r D"],
    up: Float[Tensor, "E O r"],
    scale: Float[Tensor, "E"],
    source: Int[Tensor, "R"],
    weight: Float[Tensor, "R"],
    counts: Int[Tensor, "E"],
    order: Int[Tensor, "V"],
    begin: Int[Tensor, "T+1"],
) -> Float[Tensor, "T O"]:
    """`Σ weight[r] · scale[e] · up[e] (down[e] x[source[r]])` over the rows r of each token, e being the row's expert.

    Under autocast it computes in the autocast dtype, otherwise tokens are cast to the dtype of the weights.

    Args:
        x: tokens.
        down: A of every expert.
        up: B of every expert.
        scale: s of every expert.
        source: the token that each row reads; rows are sorted by expert.
        weight: top-k weight of each row.
        counts: rows of each expert.
        order: rows sorted by token, see `combine`.
        begin: where the rows of each token begin in `order`.
    """
    low = grouped_linear(x, down, counts, source=source)
    by_row = weight * torch.repeat_interleave(scale, counts, output_size=len(source))
    rows = grouped_linear((low * by_row.unsqueeze(1)).to(low.dtype), up, counts)
    return torch.ops.moeify.gathered_sum(rows, source, order, begin)


def naive_sparse_adapters(
    x: Float[Tensor, "T D"],
    down: Float[Tensor, "E r D"],
    up: Float[Tensor, "E O r"],
    scale: Float[Tensor, "E"],
    source: Int[Tensor, "R"],
    weight: Float[Tensor, "R"],
    counts: Int[Tensor, "E"],
) -> Float[Tensor, "T O"]:
    """The reference implementation of `sparse_adapters`."""
    rows = naive_grouped_linear(naive_grouped_linear(x[source], down, counts), up, counts)
    weighted = (weight * scale.repeat_interleave(counts)).unsqueeze(1) * rows
    return x.new_zeros(len(x), up.shape[1]).index_add(0, source, weighted)


@library.custom_op("moeify::gathered_sum", mutates_args=())
def _forward(rows: Tensor, source: Tensor, order: Tensor, begin: Tensor) -> Tensor:
    """The sum of every token's rows."""
    return combine(rows, None, order, begin)


@_forward.register_fake
def _(rows: Tensor, source: Tensor, order: Tensor, begin: Tensor) -> Tensor:
    return rows.new_empty(len(begin) - 1, rows.shape[1])


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return dy[ctx.saved_tensors[0]], None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)
