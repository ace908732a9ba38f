"""Rules of attention: how configurations store heads, norms, positions and sliding windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeify.export.model_spec import Unsupported
from moeify.export.rules import Field, Traits


@dataclass(frozen=True)
class HeadDim:
    """The width of a head: a field, or D / heads in configurations without it."""

    fields: tuple[str, ...] = ("head_dim",)

    def read(self, config: Any) -> int:
        """The field, or D divided by the number of heads."""
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def write(self, value: int, traits: Traits) -> dict[str, Any]:
        """The field, written in every case."""
        return {"head_dim": value}


@dataclass(frozen=True)
class HeadNorm(Field):
    """A flag that normalises every head of queries and keys."""

    def read(self, config: Any) -> str | None:
        """`head` if it is set."""
        return "head" if getattr(config, self.name) else None

    def write(self, value: str | None, traits: Traits) -> dict[str, Any]:
        """The flag."""
        if value not in (None, "head"):
            raise Unsupported("it normalises queries and keys per head, the model over all heads together")
        return {self.name: value is not None}


@dataclass(frozen=True)
class Rope:
    """Rotary positions (RoPE): base, scaling, and the share of a head that is rotated.

    Attributes:
        partial: whether a part of every head may stay unrotated.
        scaled: whether it supports the RoPE scaling
            types of transformers, such as YaRN.
    """

    partial: bool = False
    scaled: bool = True
    fields: tuple[str, ...] = ("rope_parameters",)

    def read(self, config: Any) -> dict[str, Any]:
        """All parameters, the share always among them."""
        return {"partial_rotary_factor": 1.0, **config.rope_parameters}

    def write(self, value: dict[str, Any], traits: Traits) -> dict[str, Any]:
        """All parameters; a class that rotates whole heads has no share."""
        share = value["partial_rotary_factor"]
        if not self.scaled and value["rope_type"] != "default":
            raise Unsupported(f"it does not support rope scaling {value['rope_type']!r}")
        if self.partial:
            return {"rope_parameters": dict(value)}
        if share != 1.0:
            raise Unsupported(f"it applies rotary embeddings to whole heads, the model to {share:g} of each head")
        return {"rope_parameters": {key: part for key, part in value.items() if key != "partial_rotary_factor"}}


@dataclass(frozen=True)
class AttentionScale:
    """The scale of attention logits where it is a field; None is head_dim ** -0.5."""

    name: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The field."""
        return (self.name,)

    def read(self, config: Any) -> float | None:
        """The field, unless it has the default value."""
        scale = getattr(config, self.name)
        return None if scale == HeadDim().read(config) ** -0.5 else scale

    def write(self, value: float | None, traits: Traits) -> dict[str, Any]:
        """The number itself."""
        return {self.name: traits["head_dim"] ** -0.5 if value is None else value}


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: its ranks and widths (DeepSeek-V2 and V3).

    Attributes:
        interleaved: whether the class rotates neighbours in any case, and has no field for it.
    """

    interleaved: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields."""
        sizes = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim")
        return sizes if self.interleaved else (*sizes, "rope_interleave")

    def read(self, config: Any) -> dict[str, Any]:
        """All of them."""
        return {"rope_interleave": True} | {name: getattr(config, name) for name in self.fields}

    def write(self, value: dict[str, Any] | None, traits: Traits) -> dict[str, Any]:
        """All of them."""
        if value is None:
            raise Unsupported("its attention is latent (MLA), the model's is not")
        if self.interleaved and not value["rope_interleave"]:
            raise Unsupported("its rotary embeddings pair neighbours, the model's halves (rope_interleave=False)")
        return {name: value[name] for name in self.fields}


@dataclass(frozen=True)
class OneWindow:
    """One sliding window for all layers.

    Attributes:
        flag: a field that turns it on, if there is one.
    """

    flag: str | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields."""
        return ("sliding_window", *([self.flag] if self.flag else []))

    def read(self, config: Any) -> tuple[int | None, ...] | None:
        """The window of every layer; None if no layer has one."""
        window = config.sliding_window if self.flag is None or getattr(config, self.flag) else None
        return None if window is None else (window,) * config.num_hidden_layers

    def write(self, value: tuple[int | None, ...] | None, traits: Traits) -> dict[str, Any]:
        """The window, if it is the same everywhere."""
        windows = set(value or [None])
        if len(windows) > 1:
            raise Unsupported("all its layers have the same sliding window, and those of the model differ")
        (window,) = windows
        return {"sliding_window": window} | ({self.flag: window is not None} if self.flag else {})


@dataclass(frozen=True)
class Windows:
    """A sliding window in the layers of type `sliding_attention`."""

    extra: tuple[str, ...] = ("use_sliding_window", "max_window_layers")

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields."""
        return ("sliding_window", "layer_types", *self.extra)

    def read(self, config: Any) -> tuple[int | None, ...] | None:
        """The window of every layer; None if no layer has one."""
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        return tuple(config.sliding_window if slide else None for slide in slides) if any(slides) else None

    def write(self, value: tuple[int | None, ...] | None, traits: Traits) -> dict[str, Any]:
        """The type of every layer, and the window."""
        value = value or (None,) * traits["layers"]
        widths = {window for window in value if window is not None}
        if len(widths) > 1:
            raise Unsupported(f"its layers have one size of sliding window, those of the model {len(widths)}")
        types = ["full_attention" if window is None else "sliding_attention" for window in value]
        settings = {"use_sliding_window": bool(widths), "max_window_layers": traits["layers"]}
        window = {"sliding_window": max(widths, default=None), "layer_types": types}
        return window | {name: settings[name] for name in self.extra}
