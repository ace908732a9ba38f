"""Micro-batches without a loss: all padding, or without a label to predict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.masks import IGNORED

MASKS = ("attention_mask", "decoder_attention_mask")


def is_padding(batch: Mapping[str, Any]) -> bool:
    """Whether one of a batch's masks (B, N) marks every token as padding."""
    return any(_hides_all(batch.get(name)) for name in MASKS)


def _hides_all(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2 and not mask.any()


def as_real(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch of padding whose mask marks all tokens as real, so that a model can run on it."""
    return {
        name: torch.ones_like(value) if name in MASKS and _hides_all(value) else value for name, value in batch.items()
    }


def has_labels(batch: Mapping[str, Any]) -> bool:
    """Whether a batch has a label to predict, behind the first position, of which causal models predict none.

    Batches whose labels are no token ids (B, N) have.
    """
    labels = batch.get("shift_labels", batch.get("labels"))
    if not isinstance(labels, Tensor) or labels.dim() < 2 or labels.is_floating_point():
        return True
    return bool(labels[:, 0 if "shift_labels" in batch else 1 :].ne(IGNORED).any())


def zero(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """0, with gradients of 0 for all that a loss depends on; the loss itself may be 0 / 0."""
    return 0 * torch.where(torch.isfinite(loss), loss, 0)
