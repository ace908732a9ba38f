"""Guess the inputs of a model: random tensors of the kinds that models accept, the likeliest first."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import Tensor, nn

from moeify.find.dense import is_linear, is_quantized
from moeify.find.dense import widths as width_of

Inputs = dict[str, Tensor]


def guesses(model: nn.Module) -> Iterator[tuple[tuple[Tensor, ...], Inputs]]:
    """Arguments of a call, by position and by name."""
    config = getattr(model, "config", None)
    if config is not None:
        for inputs in _by_name(model, config):
            yield (), inputs
    given = inspect.signature(model.forward).parameters.values()
    required = [p for p in given if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    for x in _by_position(model):
        yield (x,) * len(required), {}


def _by_position(model: nn.Module) -> Iterator[Tensor]:
    """Tokens, images or vectors, by the embeddings, convolutions and linear layers of a model."""
    sizes = [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)]
    for shape in ((2, 8), (8,)) if sizes else ():
        yield torch.randint(min(sizes), shape)
    channels = next((part.in_channels for part in model.modules() if isinstance(part, nn.Conv2d)), 0)
    for size in dict.fromkeys([*_image_sizes(model), (32, 32), (64, 64), (224, 224)]) if channels else ():
        yield torch.randn(2, channels, *size)
    widths = [part.embed_dim for part in model.modules() if isinstance(part, nn.MultiheadAttention)]
    widths += [width_of(part)[1] for part in model.modules() if is_linear(part) or is_quantized(part)]
    for width in dict.fromkeys(widths):
        yield torch.randn(2, 5, width)
        yield torch.randn(4, width)


def _image_sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """The sizes that its parts say images have, as those of timm and torchvision do."""
    for part in model.modules():
        size = getattr(part, "img_size", getattr(part, "image_size", None))
        height_width = (size, size) if isinstance(size, int) else size
        if isinstance(height_width, tuple) and len(height_width) == 2 and all(isinstance(n, int) for n in height_width):
            yield height_width


def _by_name(model: nn.Module, config: Any) -> Iterator[Inputs]:
    """Inputs of every kind that a model of transformers takes, in each of their forms; then of one kind alone."""
    accepted = inspect.signature(model.forward).parameters.keys()
    kinds = [forms for kind in _KINDS if (forms := list(kind(model, config, accepted)))]
    for together in itertools.product(*kinds):
        yield {name: value for form in together for name, value in form.items()}
    if len(kinds) > 1:
        yield from itertools.chain(*kinds)
    if "inputs_embeds" in accepted and (width := _setting(config, "hidden_size", "d_model")):
        yield {"inputs_embeds": torch.randn(2, 11, width)}


def _texts(model: nn.Module, config: Any, accepted: Set[str]) -> Iterator[Inputs]:
    if "input_ids" in accepted or "decoder_input_ids" in accepted:
        vocabulary = _setting(getattr(config, "text_config", config), "vocab_size") or 6
        tokens = torch.randint(5, max(6, vocabulary), (2, 11))
        given = {"input_ids": tokens, "decoder_input_ids": tokens[:, :6]}
        yield {name: value for name, value in given.items() if name in accepted}
        if given.keys() <= accepted:
            yield {"input_ids": tokens}


def _images(model: nn.Module, config: Any, accepted: Set[str]) -> Iterator[Inputs]:
    vision = getattr(config, "vision_config", config)
    frames = _setting(vision, "num_frames", "frames_per_clip")
    size = _setting(vision, "image_size", "input_size", "img_size") or (32 if frames else 64)
    height, width = size if isinstance(size, tuple | list) else (size, size)
    picture = (_setting(vision, "num_channels", "in_chans", "in_channels") or 3, height, width)
    if "spatial_shapes" in accepted:  # patches of images of any size
        patch = _setting(vision, "patch_size") or 16
        yield {
            "pixel_values": torch.randn(2, 16, picture[0] * patch * patch),
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int64),
            "spatial_shapes": torch.full((2, 2), 4),
        }
    elif "pixel_values" in accepted:
        yield {"pixel_values": torch.randn(2, *([frames] if frames else []), *picture)}
    elif "pixel_values_videos" in accepted:
        yield {"pixel_values_videos": torch.randn(2, frames or 2, *picture)}


def _sounds(model: nn.Module, config: Any, accepted: Set[str]) -> Iterator[Inputs]:
    if "input_values" in accepted:
        yield {"input_values": torch.randn(2, 4000)}
    bins = _setting(config, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    if "input_features" not in accepted or bins is None:
        return
    if (frames := _setting(config, "max_source_positions")) is not None:
        yield {"input_features": torch.randn(2, bins, 2 * frames)}
    if "is_longer" in accepted:
        yield {"input_features": torch.randn(2, 1, 64, bins), "is_longer": torch.zeros(2, 1, dtype=torch.bool)}
    yield {"input_features": torch.randn(2, 64, bins)}


def _others(model: nn.Module, config: Any, accepted: Set[str]) -> Iterator[Inputs]:
    if {"visual_feats", "visual_pos"} <= accepted and (width := _setting(config, "visual_feat_dim")):
        yield {"visual_feats": torch.randn(2, 7, width), "visual_pos": torch.rand(2, 7, 4)}
    if "task_inputs" in accepted and (length := _setting(config, "task_seq_len")):
        yield {"task_inputs": torch.randint(5, 9, (2, length))}


_KINDS = (_texts, _images, _sounds, _others)


def _setting(config: Any, *names: str) -> Any:
    """The first of these settings in a configuration, or in those inside it."""
    inside = (getattr(config, key, None) for key in getattr(config, "sub_configs", {}))
    own = (getattr(config, name, None) for name in names)
    values = itertools.chain(own, (_setting(part, *names) for part in inside if part is not None))
    return next((value for value in values if value is not None), None)
