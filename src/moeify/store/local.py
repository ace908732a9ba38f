"""Restrict a saved config to its folder: reject or remove settings that load from the Hub or from elsewhere.

All weights are read from the folder. While transformers builds a model, it resolves a few settings over the network:
the name of a backbone, and implementations of attention or experts that are kernels of the Hub.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

LOCAL = {
    "attn": ("eager", "sdpa", "flex_attention", "paged|eager"),
    "experts": ("eager", "batched_mm", "grouped_mm", "moeify"),
}
"""Implementations that are part of transformers; for others it may download kernels."""

PRETRAINED = ("use_pretrained_backbone", "pretrained_backbone", "pretrained")


def local_config(values: dict[str, Any], file: Path) -> dict[str, Any]:
    """A model's config without settings that load from outside the folder; the model computes the same function.

    Removed, with a warning: implementations of attention and experts that are not part of transformers, and requests
    for pretrained weights.

    Args:
        values: the config, which may contain nested configs.
        file: path of the config, for messages.

    Raises:
        ValueError: a backbone whose architecture is defined on the Hub only.
    """
    _refuse_backbone(values, file)
    kept = {}
    for name, value in values.items():
        if _leads_away(name, value):
            logging.getLogger(__name__).warning("%s: left out %s=%r, which is not in the folder", file, name, value)
        else:
            kept[name] = local_config(value, file) if isinstance(value, dict) else value
    return kept


def _refuse_backbone(values: dict[str, Any], file: Path) -> None:
    timm = values.get("model_type") in ("timm_backbone", "timm_wrapper")
    name = values.get("architecture" if values.get("model_type") == "timm_wrapper" else "backbone")
    known = timm or isinstance(values.get("backbone_config"), dict)
    if isinstance(name, str) and (not known or (timm and (":" in name or "/" in name))):
        raise ValueError(
            f"{file} names the backbone {name!r}, which transformers would look up on the hub, and a folder is loaded "
            "without a network; build the dense model yourself and pass it: load(folder, model=...)"
        )


def _leads_away(name: str, value: Any) -> bool:
    if name in PRETRAINED:
        return bool(value)
    kind = name.removeprefix("_").partition("_implementation")[0] if "_implementation" in name else None
    if kind is None or value is None:
        return False
    return not all(each in LOCAL.get(kind, ()) for each in (value.values() if isinstance(value, dict) else [value]))
