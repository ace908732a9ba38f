"""Models that classify images, and the pixels that they read: a small ViT, transformers, timm, or plain PyTorch."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from moeify.data.images import fitted
from moeify.files import write_json
from moeify.tasks.base import Shape
from moeify.tasks.classify import Classes
from moeify.tasks.models import load_dense

PREPROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True)
class Pixels:
    """How an image becomes what a model reads: squared, scaled and normalised.

    Attributes:
        size: pixels of a side.
        channels: 1 or 3.
        mean: of each channel, after scaling to 0..1.
        std: of each channel.
        written: the preprocessor's configuration, as transformers writes it; empty for this one's own.
    """

    size: int
    channels: int
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    written: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, image: UInt8[Tensor, "C H W"]) -> Float[Tensor, "C S S"]:
        """The model's `pixel_values` of an image."""
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (self.mean, self.std))
        return (fitted(image, self.size, self.channels).float() / 255 - mean) / std

    def save(self, folder: Path) -> None:
        """Write what transformers needs to prepare images for the model in a folder."""
        own = {
            "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True, "do_normalize": True,
            "size": {"height": self.size, "width": self.size}, "rescale_factor": 1 / 255,
            "image_mean": list(self.mean) * (self.channels // len(self.mean)),
            "image_std": list(self.std) * (self.channels // len(self.std)),
        }  # fmt: skip
        write_json(folder / PREPROCESSOR, dict(self.written) or own)


def small_vit(shape: Shape, pixels: Pixels, patch: int, classes: Classes) -> nn.Module:
    """A ViT from scratch with a head for the classes."""
    config = ViTConfig(
        hidden_size=shape.width, intermediate_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, image_size=pixels.size, patch_size=patch, num_channels=pixels.channels,
        **classes.config(),
    )  # fmt: skip
    return ViTForImageClassification(config)


def is_plain(model: str) -> bool:
    """Whether a model is named as FILE.py:FUNCTION."""
    return ".py:" in model


def load_image_classifier(model: str, classes: Classes) -> nn.Module:
    """A model in fp32 with a head for the classes, a new one where its own has others.

    Args:
        model: of transformers, or of timm by transformers (`timm/...`, which needs timm); or FILE.py:FUNCTION, where
            the function takes the number of classes and returns a module that makes logits of images.
        classes: what it is to name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such model or function, or logits of another number of classes.
    """
    if is_plain(model):
        path, _, function = model.rpartition(":")
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path} to take a model from")
        make = runpy.run_path(path).get(function)
        if not callable(make):
            raise ValueError(f"{path} has no function {function!r} that returns a model")
        return PlainClassifier(make(len(classes.names)))
    return load_dense(
        model, "AutoModelForImageClassification", dtype=torch.float32, ignore_mismatched_sizes=True, **classes.config()
    )


class PlainClassifier(nn.Module):
    """Gives a module of plain PyTorch, images in and logits out, the inputs and the output of those of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Return the logits, and the cross-entropy of the labels."""
        logits = self.model(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def pixels_of(model: str, size: int = 0) -> Pixels:
    """What a model of transformers or timm reads, from its preprocessor's configuration, or else from its own.

    Args:
        model: a local or hub model.
        size: pixels of a side; 0 for those of the configuration.

    Raises:
        ValueError: neither gives the size of an image.
    """
    written: dict[str, Any] = {}
    try:
        written, _ = transformers.ImageProcessingMixin.get_image_processor_dict(model)
    except (OSError, ValueError):
        written = {}
    try:
        config: Any = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        hint = "; --set pretrained=false takes timm's architecture alone" if model.startswith("timm/") else ""
        reason = str(error).partition("\n")[0]
        raise ValueError(f"no model {model!r} could be loaded: {reason}{hint}") from None
    timm = getattr(config, "pretrained_cfg", None) or {}
    channels, height, *_ = (*timm.get("input_size", ()), None, None)[:2]
    given = size or written.get("crop_size") or written.get("size") or height or getattr(config, "image_size", None)
    if isinstance(given, Mapping):
        given = given.get("height") or given.get("shortest_edge")
    if isinstance(given, tuple | list):
        given = given[0]
    if given is None:
        raise ValueError(f"{model} does not tell the size of its images; give it by --set size=PIXELS")
    mean = written.get("image_mean") or timm.get("mean") or (0.5,)
    std = written.get("image_std") or timm.get("std") or (0.5,)
    return Pixels(int(given), channels or getattr(config, "num_channels", 3), tuple(mean), tuple(std), written)
