"""Ids and modality of the tokens of each layer, by the stack (encoder, decoder or tower) that the layer is in."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

MODALITIES = ("text", "image", "video", "audio")
"""The modalities of tokens."""

_OF_INPUT = {
    "pixel_values": "image",
    "pixel_values_videos": "video",
    "input_features": "audio",
    "input_values": "audio",
}
_MARKED = {
    "image_token_id": "image", "image_token_index": "image", "video_token_id": "video", "video_token_index": "video",
    "audio_token_id": "audio", "audio_token_index": "audio",
}  # fmt: skip
"""Settings of transformers that name the placeholder id of a part of an image, a video or a sound."""


@dataclass(eq=False)
class Stack:
    """A model, or its encoder, decoder or tower, whose layers all read the same tokens.

    Attributes:
        module: the model or its part.
        modality: of its tokens; None if it is decided by their ids or by the inputs.
        decodes: whether it is the decoder of a model that has an encoder.
        given: the tensors that it was called with last, by name.
    """

    module: nn.Module
    modality: str | None = None
    decodes: bool = False
    given: dict[str, Tensor] = field(default_factory=dict)

    def watch(self) -> RemovableHandle:
        """Keep the tensors that it is called with."""
        names = list(inspect.signature(type(self.module).forward).parameters)[1:]

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            values = dict(zip(names, args, strict=False)) | kwargs
            self.given = {name: value for name, value in values.items() if isinstance(value, Tensor)}

        return self.module.register_forward_pre_hook(hook, with_kwargs=True)


def stacks_of(model: nn.Module) -> list[Stack]:
    """The model, and the stacks in it that transformers names."""
    found = {id(model): Stack(model)}
    named: Any = model
    if not hasattr(model, "config") or not hasattr(model, "get_encoder"):
        return list(found.values())
    parts = [Stack(named.get_encoder(modality=kind), kind) for kind in ("image", "audio")]
    if getattr(named.config, "is_encoder_decoder", False):
        parts += [Stack(named.get_encoder()), Stack(named.get_decoder(), decodes=True)]
    base = getattr(model, "base_model", model)
    for part in parts:
        if isinstance(part.module, nn.Module) and part.module is not base:
            found.setdefault(id(part.module), part)
    return list(found.values())


def innermost(stacks: Sequence[Stack], layer: nn.Module) -> Stack:
    """The smallest stack that a layer is in; the first one, the model, has all."""
    around = [stack for stack in stacks if any(module is layer for module in stack.module.modules())]
    return min(around, key=lambda stack: sum(1 for _ in stack.module.modules()))


def ids_of(stack: Stack, model: Stack, shape: Sequence[int]) -> Int[Tensor, "all"] | None:
    """The ids of a layer's tokens of leading shape `shape`, padding included; None if its inputs are not ids."""
    if stack.modality is not None:
        return None
    above = model.given.get("decoder_input_ids" if stack.decodes else "input_ids")
    ids = stack.given.get("input_ids", above)
    if ids is None or ids.is_floating_point() or ids.numel() != math.prod(shape):
        return None
    turned = len(shape) == 2 and ids.shape != tuple(shape) and ids.T.shape == tuple(shape)
    return (ids.T if turned else ids).flatten().cpu()


def modalities_of(stack: Stack, model: Stack, ids: Int[Tensor, "all"] | None) -> Int[Tensor, "all"] | str | None:
    """The modality of tokens: indices into `MODALITIES` if ids mark images in text, else a name; None if unknown."""
    if ids is None:
        known = (_OF_INPUT[name] for name in (*stack.given, *model.given) if name in _OF_INPUT)
        return stack.modality or next(known, None)
    config = getattr(model.module, "config", None)
    marks = {kind: getattr(config, key) for key, kind in _MARKED.items() if isinstance(getattr(config, key, None), int)}
    if not any((ids == mark).any() for mark in marks.values()):
        return "text"
    found = torch.zeros_like(ids)
    for kind, mark in marks.items():
        found[ids == mark] = MODALITIES.index(kind)
    return found


def samples_of(stack: Stack, model: Stack, tokens: int) -> int:
    """The number of images, sounds or other samples of the tokens, by the inputs; 1 if these do not show it.

    An input of one number per token makes each a sample, as users and items are; patches of (T, D) do not show it.
    """
    for values in (*stack.given.values(), *model.given.values()):
        rows = len(values) if values.dim() else 0
        if rows and tokens % rows == 0 and (values.dim() == 1 if rows == tokens else values.dim() > 1):
            return rows
    return 1
