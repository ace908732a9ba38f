"""`grouped_linear`, a linear map per expert: torch's grouped GEMM where it is fastest, else one product per expert.

The product is one custom operator, so that `torch.compile` captures it as one node for every dtype, the backward pass
copies no weights, and gradients are always contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, library
from torch.nn import functional as F

from moeify.exportable import multiply_by_expert, repeat_for_rows
from moeify.kernels.cpu.gradients import new_stack
from moeify.kernels.cpu.segments import blocks, group_obstacle, multiply_rows, multiply_rows_tn
from moeify.kernels.naive import is_transformed, naive_grouped_linear


def grouped_linear(
    rows: Float[Tensor, "R D"],
    weight: Float[Tensor, "E O D"],
    counts: Int[Tensor, "E"],
    bias: Float[Tensor, "E O"] | None = None,
) -> Float[Tensor, "R O"]:
    """Multiply the first `counts[0]` rows by `weight[0]`, the next `counts[1]` by `weight[1]`, and so on.

    Under autocast it computes in the autocast dtype, otherwise rows are cast to the dtype of the weight.

    Args:
        rows: rows sorted by expert; `counts` sums to R.
        weight: one matrix per expert.
        counts: rows of each expert.
        bias: one vector per expert.
    """
    device = rows.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    product = multiply_by_expert if torch.compiler.is_exporting() else torch.ops.moeify.grouped_matmul
    product = naive_grouped_linear if is_transformed() else product
    out = product(rows.to(dtype), weight.to(dtype), counts)
    if bias is None:
        return out
    return out + repeat_for_rows(bias.to(dtype), counts, rows.shape[0])


@library.custom_op(
    "moeify::grouped_matmul", mutates_args=(), schema="(Tensor rows, Tensor weight, Tensor counts) -> Tensor"
)
def grouped_matmul(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """rows (R, D), weight (E, O, D) -> (R, O): the row times the transposed weight of its expert."""
    rows = rows.contiguous()
    if rows.is_cuda and _obstacle(rows, weight) is None:
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=counts.cumsum(0, dtype=torch.int32))
    for block in blocks(counts.tolist()):
        return multiply_rows(rows, weight, None, block)
    return rows.new_empty(0, weight.shape[1])


@grouped_matmul.register_fake
def _(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@library.custom_op(
    "moeify::grouped_matmul_tn", mutates_args=(), schema="(Tensor left, Tensor right, Tensor counts) -> Tensor"
)
def grouped_matmul_tn(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """left (R, O), right (R, D) -> (E, O, D): the sum of outer products over the rows of each expert."""
    left, right = left.contiguous(), right.contiguous()
    if left.is_cuda and _obstacle(left, right) is None:
        return F.grouped_mm(left.t(), right, offs=counts.cumsum(0, dtype=torch.int32))
    sizes = counts.tolist()
    out = new_stack((len(sizes), left.shape[1], right.shape[1]), sizes, left)
    for block in blocks(sizes):
        multiply_rows_tn(left, right, out, block)
    return out


@grouped_matmul_tn.register_fake
def _(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    return left.new_empty(counts.shape[0], left.shape[1], right.shape[1])


def _keep_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    rows, weight, counts = ctx.saved_tensors
    for_rows, for_weight, _ = ctx.needs_input_grad
    return (
        grouped_matmul(gradient, weight.transpose(1, 2), counts) if for_rows else None,
        grouped_matmul_tn(gradient, rows, counts) if for_weight else None,
        None,
    )


def _tn_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    left, right, counts = ctx.saved_tensors
    for_left, for_right, _ = ctx.needs_input_grad
    return (
        grouped_matmul(right, gradient, counts) if for_left else None,
        grouped_matmul(left, gradient.transpose(1, 2), counts) if for_right else None,
        None,
    )


grouped_matmul.register_autograd(_gradients, setup_context=_keep_inputs)
grouped_matmul_tn.register_autograd(_tn_gradients, setup_context=_keep_inputs)


def explain(rows: Float[Tensor, "R D"], weight: Float[Tensor, "E O D"]) -> str:
    """Which product `grouped_linear` runs for these tensors, and why."""
    obstacle = _obstacle(rows, weight)
    return "torch grouped_mm" if obstacle is None else f"one product per expert ({obstacle})"


def _obstacle(left: Tensor, right: Tensor) -> str | None:
    """The reason why `torch.nn.functional.grouped_mm` is not used, None if it is."""
    if not left.is_cuda:
        return group_obstacle(left, right, len(left) // len(right))
    if left.dtype != torch.bfloat16:
        return "grouped_mm wants bf16"
    if torch.cuda.get_device_capability(left.device) < (8, 0):
        return "grouped_mm wants compute capability 8.0"
    if any(size % 8 for size in (left.shape[-1], *right.shape[-2:])):
        return "grouped_mm wants rows aligned to 16 bytes"
    return None
