"""Images as tensors: files and bytes are decoded by Pillow, arrays are taken as they are."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from moeify.data.records import inside

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
"""Of the files in folders of images."""


def image_of(value: Any, folder: Path, where: str) -> UInt8[Tensor, "C H W"]:
    """The image that a field of a row holds, with one or three channels.

    Args:
        value: encoded bytes; a path; a mapping with `bytes` or `path`, as the library datasets writes; an array
            (H, W), (H, W, C) or (C, H, W), of bytes or of floats from 0 to 1; or an image of Pillow.
        folder: where paths start.
        where: the name of the row in messages.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: something else, a damaged image, or a path outside of the folder.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return _decoded(io.BytesIO(value), where)
    if isinstance(value, str):
        return _decoded(inside(folder, value), f"{where}, {value}")
    if hasattr(value, "convert"):
        return _pixels(value)
    try:
        return _array(value if isinstance(value, Tensor) else torch.tensor(value))
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{where}: an image is bytes, a path or an array (H, W), (H, W, 3) or (3, H, W), not {value!r:.60}"
        ) from None


def _decoded(source: Any, where: str) -> UInt8[Tensor, "C H W"]:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError(f"{where}: images are decoded by Pillow; pip install 'moeify[images]'") from None
    try:
        with Image.open(source) as picture:
            return _pixels(picture)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where} is not an image that can be read: {error}") from None


def _pixels(picture: Any) -> UInt8[Tensor, "C H W"]:
    """A picture of Pillow in grey if it has no colour, else in RGB."""
    grey = picture.mode in ("1", "L", "LA", "I", "I;16", "F")
    picture = picture.convert("L" if grey else "RGB")
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, -1).permute(2, 0, 1).contiguous()


def _array(array: Tensor) -> UInt8[Tensor, "C H W"]:
    if array.dim() == 2:
        array = array.unsqueeze(0)
    elif array.dim() == 3 and array.shape[-1] in (1, 3) and array.shape[0] not in (1, 3):
        array = array.permute(2, 0, 1)
    if array.dim() != 3 or array.shape[0] not in (1, 3):
        raise ValueError("another shape")
    return (array * 255).round().clamp(0, 255).to(torch.uint8) if array.is_floating_point() else array.to(torch.uint8)


def fitted(image: UInt8[Tensor, "C H W"], size: int, channels: int) -> UInt8[Tensor, "C S S"]:
    """The image in a square of `size` pixels, with antialiasing, and with one channel or three."""
    if image.shape[0] != channels:
        image = image.expand(channels, -1, -1) if channels == 3 else image.float().mean(0, keepdim=True).to(torch.uint8)
    if image.shape[1:] == (size, size):
        return image
    scaled = torch.nn.functional.interpolate(
        image.unsqueeze(0).float(), (size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return scaled[0].round().clamp(0, 255).to(torch.uint8)
