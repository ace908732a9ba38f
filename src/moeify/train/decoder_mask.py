"""The mask of a decoder's padding in sequence-to-sequence training, where batches imply it by their labels alone."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moeify.masks import of_labels


def with_decoder_mask(model: nn.Module, batch: Any) -> Any:
    """A batch of an encoder-decoder with the `decoder_attention_mask` that its labels imply, so no padding is routed.

    The tokens of a step are counted by it before the model runs. Other batches are handed back.
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
    return {**batch, "decoder_attention_mask": of_labels(labels)}
