"""The mask of a decoder's padding in sequence-to-sequence training, where batches imply it by their labels alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

IGNORED = -100
"""The label of positions without a loss, as in `torch.nn.functional.cross_entropy`."""


def with_decoder_mask(model: nn.Module, batch: Any) -> Any:
    """A batch of an encoder-decoder with the `decoder_attention_mask` that its labels imply, so no padding is routed.

    A causal decoder computes the same for all real positions with and without it. Other batches are handed back.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.dim() != 2 or batch.get("decoder_attention_mask") is not None:
        return batch
    unwrapped: Any = model
    if hasattr(unwrapped, "get_base_model"):  # of PEFT
        unwrapped = unwrapped.get_base_model()
    is_encoder_decoder = getattr(getattr(unwrapped, "config", None), "is_encoder_decoder", False)
    if not is_encoder_decoder or "decoder_attention_mask" not in inspect.signature(unwrapped.forward).parameters:
        return batch
    return {**batch, "decoder_attention_mask": decoder_mask(labels)}


def decoder_mask(labels: Int[Tensor, "B N"]) -> Int[Tensor, "B N"]:
    """1 up to the last position of a row that has a loss, 0 behind it; the first position is always real."""
    real = labels.ne(IGNORED).flip(1).cumsum(1).flip(1).gt(0)
    real[:, 0] = True
    return real.long()
