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
_SEQUENCES |= {"bbox", "visual_feats", "visual_pos", "entity_ids", "entity_position_ids"}
_MASKS = {
    "decoder_input_ids": "decoder_attention_mask",
    "visual_feats": "visual_attention_mask",
    "entity_ids": "entity_attention_mask",
}
_NO_MASKS = {"bbox", "visual_pos", "entity_position_ids"}
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
            case "mel":
                given["input_features"] = _randn(2, 1, 64, _of(config, "num_mel_bins"))
                given["is_longer"] = torch.zeros(2, 1, dtype=torch.bool)
            case "patches":
                size = _of(config, "patch_size")
                given |= {"pixel_values": _randn(2, 16, 3 * size * size), "spatial_shapes": torch.full((2, 2), 4)}
                given["pixel_attention_mask"] = torch.ones(2, 16, dtype=torch.long)
            case "task":
                given["task_inputs"] = _ids(2, config.task_seq_len)
            case "regions":
                size = config.visual_feat_dim
                given |= {"visual_feats": _randn(2, LENGTH, size), "visual_pos": _randn(2, LENGTH, 4)}
            case "visual":
                given["visual_embeds"] = _randn(2, 4, config.visual_embedding_dim)
            case "entities":
                given["entity_ids"] = _ids(2, WRITTEN)
                given["entity_position_ids"] = torch.arange(2).expand(2, WRITTEN, 2)
            case "hidden":
                name = "inputs_embeds" if "inputs_embeds" in accepted else "hidden_states"
                given[name] = _randn(2, LENGTH, config.hidden_size)
            case _:
                raise ValueError(f"no inputs of kind {part!r} are known")
    return given


def alone(given: Inputs) -> Inputs:
    """The second sequence by itself, as long as it is."""
    one = {name: _cut(name, value)[1:] for name, value in given.items()}
    if "spatial_shapes" in given:
        one |= {name: given[name][1:, :8] for name in ("pixel_values", "pixel_attention_mask")}
        one["spatial_shapes"] = torch.tensor([[2, 4]])
    return one


def _cut(name: str, value: Tensor) -> Tensor:
    if not _is_sequence(name) or value.dim() == 4:
        return value
    return value[:, : _short(name, value)]


def padded(given: Inputs, side: str) -> Inputs:
    """The batch with a shorter second sequence, padded on one side, and the masks that say so."""
    batch = dict(given)
    for name, value in given.items():
        if not _is_sequence(name) or value.dim() == 4:
            continue
        real = torch.ones(value.shape[:2], dtype=torch.long)
        real[1, _short(name, value) :] = 0
        value = value.clone()
        if side == "left":
            real = real.flip(1)
            value[1] = value[1].roll(value.shape[1] - _short(name, value), 0)
        batch[name] = value.masked_fill(~real.bool().view(*real.shape, *[1] * (value.dim() - 2)), 0)
        if name not in _NO_MASKS:
            batch[_MASKS.get(name, "attention_mask")] = real
    if "spatial_shapes" in given:
        batch["spatial_shapes"] = torch.tensor([[4, 4], [2, 4]])
        batch["pixel_attention_mask"] = (torch.arange(16) < torch.tensor([[16], [8]])).long()
    return batch


def _is_sequence(name: str) -> bool:
    return name in _SEQUENCES


def _short(name: str, value: Tensor) -> int:
    """The length of the second sequence: of texts a little more than half, of sounds too."""
    return {LENGTH: SHORT, WRITTEN: 3}.get(value.shape[1], value.shape[1] * 5 // 8)
