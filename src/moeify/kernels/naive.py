"""The reference implementation of `grouped_linear`, with which all others must agree, in outputs and gradients."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F


def naive_grouped_linear(
    rows: Float[Tensor, "R D"],
    weight: Float[Tensor, "E O D"],
    counts: Int[Tensor, "E"],
    bias: Float[Tensor, "E O"] | None = None,
) -> Float[Tensor, "R O"]:
    """Multiply the first `counts[0]` rows by `weight[0]`, the next `counts[1]` by `weight[1]`, and so on."""
    parts = rows.split(counts.tolist())
    return torch.cat([F.linear(part, weight[e], None if bias is None else bias[e]) for e, part in enumerate(parts)])


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward mode is active, which follow torch's own operators only."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
