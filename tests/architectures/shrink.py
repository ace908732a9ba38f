"""Tiny configurations of any architecture of transformers: every size of a configuration made small."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 96
FIRST_SPECIAL = 80  # token ids from here on stand for images, borders and the like; texts have smaller ones

# The size of everything whose name matches: the first pattern counts.
_SIZES: list[tuple[str, int]] = [
    (r"vocab_size|entity_vocab_size|type_vocab|num_embeddings$", VOCABULARY),
    (r"(max|n)_(2d_)?(position|pos|ctx|positions|source_positions|target_positions).*|max_.*position.*", 128),
    (r".*(intermediate|ffn|ff|mlp|inner|feedforward)_?(hidden_)?(size|dim|channels)?|n_inner|dim_feedforward", 48),
    (r".*(num|n)_?(key_value|kv)_(attention_)?heads.*|num_key_value_heads|n_kv_heads", 4),
    (r".*(heads?|n_head)$|.*attention_heads.*|.*_heads$", 4),
    (r"head_dim|.*_head_dim|d_kv|kv_channels|head_size|attention_head_size|d_head", 8),
    (r"(num|n)_(hidden_)?(layers?|blocks)|.*(_layers|n_layer|_blocks|num_layers)$|depth", 2),
    (r"image_size|input_size|img_size", 32),
    (r".*patch_size", 8),
    (r".*(hidden_size|hidden_dim|d_model|embed_dim|embedding_size|n_embd|embedding_dim)|hidden_size_.*", 32),
    (r"projection_dim|.*_embed_proj_dim|proj_dim|output_dim|decoder_dim", 32),
    (r".*lora_rank", 8),
    (r"num_labels|num_queries|num_image_tokens|num_query_tokens", 6),
]  # fmt: skip


def shrunk(config_class: type, **options: Any) -> dict[str, Any]:
    """Arguments of a tiny configuration."""
    default = config_class()
    nested = getattr(config_class, "sub_configs", {})
    sizes: dict[str, Any] = {}
    for field in dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ():
        value = getattr(default, field.name, None)
        if field.name in nested or isinstance(value, bool) or field.default is None:
            continue
        if isinstance(value, int) and value > 1 and (size := _size(field.name)) is not None:
            sizes[field.name] = min(value, size)
    taken = FIRST_SPECIAL
    for name in dir(default):
        value = getattr(default, name, None) if name.endswith(("token_id", "token_index")) else None
        if isinstance(value, int) and value >= FIRST_SPECIAL:
            sizes[name], taken = taken, taken + 1
    for name in nested:
        part = getattr(default, name, None)
        if part is not None and not isinstance(part, dict):
            sizes[name] = {"model_type": part.model_type} | shrunk(type(part), **options.pop(name, {}))
    return sizes | options


def _size(name: str) -> int | None:
    return next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)


def build(model_type: str, options: dict[str, Any], auto: Any = AutoModel) -> PreTrainedModel:
    """A tiny model with random weights large enough that every part of it shows in its output."""
    config_class = CONFIG_MAPPING[model_type]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(config_class(**shrunk(config_class, **options))).eval()
