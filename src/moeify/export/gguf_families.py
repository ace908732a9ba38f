"""The table of llama.cpp's architectures with experts: what each computes, and its keys in a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from moeify.export.families import Names
from moeify.export.layer_rules import AllSparse, DenseFirst, Groups, SharedCount, SharedWidth, SomeShared
from moeify.export.model_spec import Unsupported
from moeify.export.rules import Always, Field, Traits, WriteRule


@dataclass(frozen=True)
class Either:
    """The architecture supports each of several values.

    Attributes:
        values: these values; empty for any value.
    """

    values: tuple[Any, ...] = ()

    def write(self, value: Any, traits: Traits) -> dict[str, Any]:
        """Nothing: llama.cpp infers it from the tensors, or it has no effect there."""
        if self.values and value not in self.values:
            raise Unsupported(
                f"it can have {' or '.join(map(str, self.values))}, the model has {value}", self.values[0]
            )
        return {}


@dataclass(frozen=True)
class Silu:
    """The activation SiLU, the only one of gated experts in llama.cpp."""

    def write(self, value: str, traits: Traits) -> dict[str, Any]:
        """No key, if the model has this activation."""
        if value not in ("silu", "swish"):
            raise Unsupported(f"its experts compute silu, the model's {value}")
        return {}


@dataclass(frozen=True)
class Heads:
    """Widths of heads.

    Attributes:
        square: whether all heads together must be as wide as the model.
    """

    square: bool = False

    def write(self, value: int, traits: Traits) -> dict[str, Any]:
        """Widths of keys and values."""
        if self.square and value * traits["heads"] != traits["width"]:
            raise Unsupported(
                f"its heads add up to a width of {traits['width']}, the model's to {value * traits['heads']}"
            )
        return {"attention.key_length": value, "attention.value_length": value}


@dataclass(frozen=True)
class Positions:
    """Rotary positions without scaling, or with factors of their own for every frequency.

    Attributes:
        partial: whether a part of every head may stay unrotated.
        factors: whether the file may have a factor for every frequency.
    """

    partial: bool = False
    factors: bool = False

    def write(self, value: dict[str, Any], traits: Traits) -> dict[str, Any]:
        """The base, and how many units of a head are rotated."""
        share, kind = value["partial_rotary_factor"], value["rope_type"]
        if share != 1.0 and not self.partial:
            raise Unsupported(f"it applies rotary embeddings to whole heads, the model to {share:g} of each head")
        if kind not in (("default", "llama3", "linear") if self.factors else ("default",)):
            raise Unsupported(f"it does not support rope scaling {kind!r}")
        turning = int(traits["head_dim"] * share)
        return {"rope.freq_base": float(value["rope_theta"]), "rope.dimension_count": turning}


@dataclass(frozen=True)
class Gating:
    """The score function, stored as a number."""

    def write(self, value: str, traits: Traits) -> dict[str, Any]:
        """1 for softmax, 2 for sigmoid."""
        if value not in ("softmax", "sigmoid"):
            raise Unsupported(f"its scores are softmax or sigmoid, the model's {value}")
        return {"expert_gating_func": 1 if value == "softmax" else 2}


@dataclass(frozen=True)
class OwnScale:
    """The scale of attention logits, written even where it is the usual number."""

    def write(self, value: float | None, traits: Traits) -> dict[str, Any]:
        """The number itself."""
        return {"attention.scale": traits["head_dim"] ** -0.5 if value is None else value}


COMMON: Mapping[str, WriteRule] = MappingProxyType({
    "vocabulary": Field("vocab_size"), "width": Field("embedding_length"), "layers": Field("block_count"),
    "heads": Field("attention.head_count"), "kv_heads": Field("attention.head_count_kv"), "head_dim": Heads(),
    "activation": Silu(), "positions": Field("context_length"), "norm_eps": Field("attention.layer_norm_rms_epsilon"),
    "rope": Positions(), "tied": Either(), "pad": Either(), "bos": Either(), "eos": Either(), "init_std": Either(),
    "attention_dropout": Either(), "norm": Always("rms"), "norms": Always("before"), "query_key_norm": Always(None),
    "rope_pairs": Always("halves"), "qkv_bias": Either(), "o_bias": Always(False), "ffn_bias": Always(False),
    "head_bias": Always(False), "windows": Always(None), "clip_qkv": Always(None), "latent": Always(None),
    "parallel": Always(False),
    "attention_scale": Always(None), "embedding_scale": Always(1.0), "residual_scale": Always(1.0),
    "logits_divisor": Always(1.0), "ffn_hidden": Field("feed_forward_length"),
    "num_experts": Field("expert_count"), "k": Field("expert_used_count"),
    "expert_hidden": Field("expert_feed_forward_length"), "sparse_layers": AllSparse(), "score": Always("softmax"),
    "normalize": Always(True), "scale": Always(1.0), "selection_bias": Always(False), "groups": Always(None),
    "epsilon": Always(None), "shared": Always(None),
})  # fmt: skip
"""The traits of most architectures."""

_PARTS: Names = {
    "router": "ffn_gate_inp.weight",
    "selection_bias": "exp_probs_b.bias",
    "gate_up": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    "down": "ffn_down_exps.weight",
    "shared_gate_up": ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
    "shared_down": "ffn_down_shexp.weight",
    "shared_gate": "ffn_gate_inp_shexp.weight",
}


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp.

    Attributes:
        title: its name in GGUF files.
        differs: the traits in which it differs from `COMMON`.
        settings: keys that are written as they are.
        names: of the tensors of a sparse layer.
    """

    title: str
    differs: Mapping[str, WriteRule] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    names: Names = field(default_factory=lambda: _PARTS)

    @property
    def rules(self) -> dict[str, WriteRule]:
        """How it stores every trait."""
        return {**COMMON, **self.differs}


_ONE_WIDTH = {"expert_hidden": Field("feed_forward_length"), "ffn_hidden": Either()}
_ROTATED = {"rope_pairs": Always("neighbours"), "o_bias": Either()}
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({row.title: row for row in (
    Architecture("llama", {**_ONE_WIDTH, **_ROTATED, "rope": Positions(factors=True)}),
    Architecture("qwen3moe", {"query_key_norm": Always("head")}),
    Architecture("olmoe", {
        **_ONE_WIDTH, "query_key_norm": Always("width"), "normalize": Always(False), "tied": Always(False),
        "head_dim": Heads(square=True),
    }),
    Architecture("granitemoe", {
        **_ONE_WIDTH, **_ROTATED, "shared": SharedWidth("expert_shared_feed_forward_length", "plain"),
        "attention_scale": OwnScale(), "embedding_scale": Field("embedding_scale"),
        "residual_scale": Field("residual_scale"), "logits_divisor": Field("logit_scale"),
    }),
    Architecture("qwen2moe", {
        "head_dim": Heads(square=True), "tied": Always(False), "normalize": Always(False),
        "shared": SomeShared(SharedWidth("expert_shared_feed_forward_length", "gated"), "gated"),
    }),
    Architecture("ernie4_5-moe", {
        "rope_pairs": Always("neighbours"), "sparse_layers": DenseFirst("leading_dense_block_count"),
        "selection_bias": Either(), "shared": SharedWidth("expert_shared_feed_forward_length", "plain"),
    }, {"interleave_moe_layer_step": 1}),
    Architecture("glm4moe", {
        "rope": Positions(partial=True), "query_key_norm": Either((None, "head")),
        "sparse_layers": DenseFirst("leading_dense_block_count"), "score": Gating(),
        "normalize": Field("expert_weights_norm"), "scale": Field("expert_weights_scale"),
        "selection_bias": Always(True), "groups": Groups("top2", ("expert_group_count", "expert_group_used_count")),
        "shared": SomeShared(SharedCount("expert_shared_count"), "plain"),
    }),
)})  # fmt: skip
"""Architectures by name, in the order in which they are tried."""
