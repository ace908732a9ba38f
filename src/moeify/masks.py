"""Read attention masks: which tokens are real and which are padding, in the many forms that models pass them in."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

HIDING = frozenset({"src_key_padding_mask", "tgt_key_padding_mask", "decoder_padding_mask"})

IGNORED = -100
"""The label of positions without a loss, as in `torch.nn.functional.cross_entropy`."""

_OF_A_LAYER = (
    *("attention_mask", "attn_mask", "attention_inputs"),
    *("tgt_key_padding_mask", "src_key_padding_mask", "decoder_padding_mask", "encoder_padding_mask"),
)
_FUNNEL_MASK = 2  # of (position embeddings, token types, mask, mask of the first token)


def real_tokens(mask: Bool[Tensor, "B N"] | Tensor) -> Bool[Tensor, "B N"]:
    """The tokens that a mask with one entry per token marks as real.

    Integers and bools, and floats from 0 to 1, are 1 for a real token. Floats that are added to scores are 0 for a real
    token and negative for padding; all zeros is such a mask, for no batch is all padding. All False is one too:
    Mask2Former passes it where no token is hidden.
    """
    if mask.dtype is torch.bool:
        return mask | ~mask.any()
    if not mask.is_floating_point():
        return mask.bool()
    added = (mask.amin() < 0) | (mask.amax() <= 0)
    return torch.where(added, mask >= 0, mask > 0)


def of_labels(labels: Int[Tensor, "B N"]) -> Int[Tensor, "B N"]:
    """1 up to the last position of a row that has a loss, 0 behind it; the first position is always real.

    These are the real tokens of a decoder whose inputs are its labels, moved by one position. It is causal, so it
    computes the same for all of them whether the others are masked or not.
    """
    real = labels.ne(IGNORED).flip(1).cumsum(1).flip(1).gt(0)
    real[:, 0] = True
    return real.long()


def numbers_documents(mask: Tensor) -> bool:
    """Whether a mask (B, N) numbers the documents of packed rows, such as 1, 1, 2, 2, 0, and not only real tokens."""
    whole = mask.dim() == 2 and not mask.is_floating_point() and mask.dtype is not torch.bool and not mask.is_meta
    return whole and mask.numel() > 0 and mask.amax().item() > 1


def seen(mask: Tensor) -> Bool[Tensor, "..."]:
    """Which keys a mask of queries and keys lets each query see; it may be one that is added to scores."""
    if not mask.is_floating_point():
        return mask.bool()
    return torch.where((mask.amin() < 0) | (mask.amax() <= 0), mask > -1e4, mask > 0)


def seen_keys(mask: Tensor) -> Bool[Tensor, "B N"]:
    """The tokens that a mask of queries and keys, (B, ..., Q, K), lets any query of their sequence see."""
    return seen(mask).flatten(1, -2).any(1)


def places(module: nn.Module) -> list[tuple[str, int | None]]:
    """The arguments by which a module is given a mask of the tokens that it reads, by name and position."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [name for name in _OF_A_LAYER if name in {p.name for p in parameters}]
    return [(name, by_position.index(name) if name in by_position else None) for name in names]


def given_mask(
    found: list[tuple[str, int | None]], args: tuple, kwargs: dict[str, Any]
) -> tuple[str, Tensor] | Literal[False] | None:
    """The mask that a call passes in one of these places, and its name; None if it passes none, False if no tensor."""
    unread = False
    for name, position in found:
        value = kwargs.get(name, args[position] if position is not None and position < len(args) else None)
        if name == "attention_inputs" and isinstance(value, tuple):
            value = value[_FUNNEL_MASK]
        if isinstance(value, Tensor):
            return name, value
        unread = unread or value is not None
    return False if unread else None


def is_of_keys(mask: Tensor, tokens: int) -> bool:
    """Whether a mask has one entry for each of a layer's tokens, the same for all queries: (B, N) or (B, 1, 1, N)."""
    return mask.dim() > 1 and math.prod(mask.shape[1:-1]) == 1 and mask.numel() == tokens


def of_layer(name: str, mask: Tensor, shape: Sequence[int]) -> Bool[Tensor, "B N"] | None:
    """The real tokens of a layer that is given a mask, None if the mask is not one of this layer's own tokens.

    A layer with several streams of the same tokens, one after the other (ProphetNet), has the mask of each.

    Args:
        name: of the argument, which may say that True is padding.
        mask: (B, N), or of queries and keys, (B, ..., Q, K).
        shape: leading shape of the layer's tokens, (B, N), (N, B) or flattened.
    """
    if mask.dim() < 2:
        return None
    if mask.dim() > 2 and mask.shape[0] == 1 and len(shape) == 2:
        mask = mask.expand(shape[0], *mask.shape[1:])
    batch, length = mask.shape[0], mask.shape[-1]
    tokens = math.prod(shape)
    streams, rest = tokens // (batch * length), tokens % (batch * length)
    if (
        rest
        or not streams
        or (len(shape) > 1 and tuple(shape) not in ((batch, streams * length), (streams * length, batch)))
    ):
        return None
    hiding = "padding_mask" in name
    real = seen_keys(mask) if mask.dim() > 2 else ~mask.bool() if hiding else real_tokens(mask)
    return real.repeat(1, streams)
