"""Inputs for any tiny architecture: a batch of two, and the same batch with a shorter second sequence, padded."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from architectures.shrink import FIRST_SPECIAL

LENGTH, SHORT, WRITTEN = 12, 7, 5
Inputs = dict[str, Any]
_SEQUENCES = {"input_ids", "decoder_input_ids", "input_values", "input_features", "inputs_embeds", "hidden_states"}
_SEQUENCES |= {"bbox"}
_BINS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "d_input")


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(5, FIRST_SPECIAL, (batch, length), generator=torch.Generator().manual_seed(2))


def _of(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these settings in a configuration or in the parts of it."""
    for name in names:
        for part in (config, *(getattr(config, sub, None) for sub in getattr(config, "sub_configs", {}))):
            if (value := getattr(part, name, None)) is not None:
                return value
    return default


def image(config: Any) -> Tensor:
    size = _of(config, "image_size", "input_size", "img_size", default=32)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return _randn(2, _of(config, "num_channels", "in_chans", "in_channels", default=3), height, width)


def video(config: Any) -> Tensor:
    still = image(config)
    frames = _of(config, "num_frames", "frames_per_clip", default=2)
    return _randn(2, frames, *still.shape[1:])


def whole(kind: str, model: PreTrainedModel) -> Inputs:
    """A batch without padding."""
    config, accepted = model.config, inspect.signature(model.forward).parameters
    given: Inputs = {}
    for part in kind.split("+"):
        match part:
            case "text":
                given["input_ids"] = _ids(2, LENGTH)
            case "written":
                given["decoder_input_ids"] = _ids(2, WRITTEN)
            case "boxes":
                given["bbox"] = torch.tensor([1, 2, 10, 20]).expand(2, LENGTH, 4)
            case "image":
                given["pixel_values"] = image(config)
            case "video":
                given["pixel_values" if "pixel_values" in accepted else "pixel_values_videos"] = video(config)
            case "sound":
                given["input_values"] = _randn(2, 2000)
            case "frames":
                given["input_features"] = _randn(2, 64, _of(config, *_BINS))
            case "spectrum":
                frames = 2 * _of(config, "max_source_positions", default=64)
                given["input_features"] = _randn(2, _of(config, *_BINS), frames)
            case "hidden":
                name = "inputs_embeds" if "inputs_embeds" in accepted else "hidden_states"
                given[name] = _randn(2, LENGTH, config.hidden_size)
            case _:
                raise ValueError(f"no inputs of kind {part!r} are known")
    return given


def alone(given: Inputs) -> Inputs:
    """The second sequence by itself, as long as it is."""
    return {
        name: value[1:, : _short(name, value)] if _is_sequence(name) else value[1:] for name, value in given.items()
    }


def padded(given: Inputs, side: str) -> Inputs:
    """The batch with a shorter second sequence, padded on one side, and the masks that say so."""
    batch = dict(given)
    for name, value in given.items():
        if not _is_sequence(name):
            continue
        real = torch.ones(value.shape[:2], dtype=torch.long)
        real[1, _short(name, value) :] = 0
        value = value.clone()
        if side == "left":
            real = real.flip(1)
            value[1] = value[1].roll(value.shape[1] - _short(name, value), 0)
        mask = "decoder_attention_mask" if name.startswith("decoder") else "attention_mask"
        batch[name] = value.masked_fill(~real.bool().view(*real.shape, *[1] * (value.dim() - 2)), 0)
        batch[mask] = real
    return batch


def _is_sequence(name: str) -> bool:
    return name in _SEQUENCES


def _short(name: str, value: Tensor) -> int:
    """The length of the second sequence: of texts a little more than half, of sounds too."""
    return {LENGTH: SHORT, WRITTEN: 3}.get(value.shape[1], value.shape[1] * 5 // 8)
