"""Check before training which model classes of other programs can represent the sparse models that a recipe makes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from moeify.export.families import DENSE
from moeify.export.gguf_file import GgufFile
from moeify.export.hf_folder import HfFolder
from moeify.export.match import Match
from moeify.export.mlx import MlxFolder
from moeify.export.model_spec import Unsupported
from moeify.registry import suggest
from moeify.routers import Capacity
from moeify.sparsify import Recipe, sparsify

_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_SIZES_OF: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "stablelm": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    "deepseek_v3": {
        "first_k_dense_replace": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Compatibility:
    """Whether another program can hold the sparse model that a recipe makes.

    Attributes:
        architecture: the class of transformers or architecture of llama.cpp that can hold it, None if none can.
        rewrites: what is rewritten without changing the function; empty where the class fits exactly.
        without_capacity: whether this needs the capacity to be off in evaluation.
        reason: why no class can hold it.
        trait: the first trait in which the nearest class differs.
    """

    architecture: str | None
    rewrites: tuple[str, ...] = ()
    without_capacity: bool = False
    reason: str = ""
    trait: str = ""

    @property
    def kind(self) -> str:
        """`exact`, `rewrite` or `unsupported`."""
        if self.architecture is None:
            return "unsupported"
        return "rewrite" if self.rewrites else "exact"


def compatibility(recipe: Recipe, base: str) -> dict[str, Compatibility]:
    """Whether transformers, llama.cpp and MLX can hold what a recipe makes of a base family, by exporter.

    A tiny model of the family is made sparse. Selection biases and default vectors get random values, as after
    training. For a given model, `supports` also sees its own settings, such as a sliding window.

    Args:
        recipe: of the sparse model.
        base: a `model_type` of the table `families.DENSE`.

    Raises:
        ValueError: an unknown family, or one that the recipe finds nothing in.
    """
    model = tiny_model(recipe, base)
    found = _compatibilities(model)
    limits = [part for part in model.modules() if isinstance(part, Capacity)]
    for limit in limits:
        limit.eval_factor = math.inf
    if not limits or all(each.architecture for each in found.values()):
        return found
    again = {to: replace(each, without_capacity=True) for to, each in _compatibilities(model).items()}
    return {to: each if each.architecture else again[to] for to, each in found.items()}


def _compatibilities(model: nn.Module) -> dict[str, Compatibility]:
    programs = {"transformers": HfFolder(), "gguf": GgufFile(), "mlx": MlxFolder()}
    return {to: _compatibility(exporter, model) for to, exporter in programs.items()}


def _compatibility(exporter: HfFolder | GgufFile | MlxFolder, model: nn.Module) -> Compatibility:
    try:
        found: Match[Any] = exporter.match(model)
    except Unsupported as error:
        return Compatibility(None, reason=str(error), trait=error.trait)
    return Compatibility(found.family.title, found.rewrites)


def tiny_model(recipe: Recipe, base: str, *, layers: int = 4) -> nn.Module:
    """A tiny sparse model of a base family, whose selection biases and default vectors are random, as after training.

    Args:
        recipe: of the sparse model.
        base: a `model_type` of the table `families.DENSE`.
        layers: of the model.

    Raises:
        ValueError: an unknown family, or one that the recipe finds nothing in.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if base not in DENSE:
        raise ValueError(f"no family of dense models is called {base!r}; {suggest(base, [*DENSE])}")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {**_SIZES, **_SIZES_OF.get(base, {}), "num_hidden_layers": layers}
        config = AutoConfig.for_model(base, **sizes)
        model = sparsify(AutoModelForCausalLM.from_config(config), recipe, verbose=False, allow_noncausal=True)
        for name, buffer in model.named_buffers():
            if name.endswith(("selection_bias", ".default")):
                buffer.uniform_()
    return model.eval()
