"""The random split, with which LLaMA-MoE's released models were made."""

from __future__ import annotations

import torch
from jaxtyping import Int

from moeify.find.dense import DenseFFN
from moeify.registry import register


@register("split", "random")
def random(dense: DenseFFN, parts: int) -> Int[torch.Tensor, "E h"]:
    """Hidden units at random, which LLaMA-MoE found best after continued training."""
    return torch.randperm(dense.hidden).view(parts, -1)
