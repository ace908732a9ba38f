"""Find the modules of a Llama-like decoder by their attribute names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import nn

from moeify.backends.base import has_other_forward
from moeify.compress.quantized_layers import QuantizedLinear

Linear = nn.Linear | QuantizedLinear


@dataclass(frozen=True)
class Layer:
    """x += o(attention(q, k, v of norm(x))); x += mlp(norm(x)).

    Attributes:
        attention: has `q_proj`, `k_proj`, `v_proj`, `o_proj`, and `q_norm` and `k_norm` in some architectures.
        mlp: a dense FFN, a sparse block of transformers, or a `moeify.MoE`.
        before_attention: the RMSNorm before the attention.
        before_mlp: the RMSNorm before `mlp`.
    """

    attention: Any
    mlp: nn.Module
    before_attention: Any
    before_mlp: Any

    @property
    def norms(self) -> list[Any]:
        """The norms of the layer, including those of queries and keys."""
        inside = [getattr(self.attention, name, None) for name in ("q_norm", "k_norm")]
        return [self.before_attention, self.before_mlp, *(norm for norm in inside if norm is not None)]


@dataclass(frozen=True)
class Decoder:
    """The modules of a decoder: logits = head(norm(layers(embed(ids)))).

    Attributes:
        embed: the token embedding.
        layers: the layers.
        norm: the RMSNorm after the last layer.
        head: the language-model head.
        rotary: the rotary position embedding, from positions to cosines and sines.
        dtype: the dtype of the embedding.
    """

    embed: nn.Module
    layers: list[Layer]
    norm: Any
    head: Linear
    rotary: nn.Module
    dtype: torch.dtype


def find_decoder(model: nn.Module) -> Decoder:
    """The modules of a Llama-like decoder.

    Raises:
        ValueError: a module is missing, has an unsupported type, or the model is not in fp32 or bf16 on a CPU.
    """
    body: Any = getattr(model, "model", None)
    names = ("embed_tokens", "layers", "norm", "rotary_emb")
    if body is None or not all(hasattr(body, name) for name in names) or not hasattr(model, "lm_head"):
        raise _no(model, "it has no lm_head over a model with embed_tokens, layers, norm and rotary_emb")
    parts = ((name, module) for name, module in model.named_modules() if module is not model)
    if away := next((name for name, module in parts if has_other_forward(module) or has_no_weights(module)), ""):
        raise _no(model, f"{away} is offloaded, so its weights come only when it is called; load the model into memory")
    weight = body.embed_tokens.weight
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        raise _no(
            model, f"it is in {weight.dtype} on {weight.device}, and the kernel computes in fp32 or bf16 on a CPU"
        )
    layers = [_layer(model, name, layer) for name, layer in body.layers.named_children()]
    head: Any = model.lm_head
    if not is_linear(head):
        raise _no(model, f"its head is {type(head).__name__}, not a plain linear layer")
    decoder = Decoder(body.embed_tokens, layers, body.norm, head, body.rotary_emb, weight.dtype)
    for norm in [decoder.norm, *(norm for layer in layers for norm in layer.norms)]:
        if not hasattr(norm, "variance_epsilon") or norm.weight.dim() != 1 or len(list(norm.parameters())) != 1:
            raise _no(model, f"{type(norm).__name__} is not a root-mean-square norm of transformers")
    return decoder


def has_no_weights(module: nn.Module) -> bool:
    """Whether a tensor of a module is on the meta device, as where its weights are offloaded."""
    for held in (module._parameters, module._buffers):
        for weight in held.values():
            if weight is not None and weight.is_meta:
                return True
    return False


def is_linear(module: nn.Module | None) -> TypeGuard[Linear]:
    """Whether the kernel supports a module: an `nn.Linear` that is not transposed, or a `QuantizedLinear`."""
    return type(module) is QuantizedLinear or (type(module) is nn.Linear and module.weight.stride(1) == 1)


def _layer(model: nn.Module, name: str, layer: Any) -> Layer:
    found = dict(layer.named_children())
    attention = found.pop("self_attn", None)
    wanted = ("mlp", "input_layernorm", "post_attention_layernorm")
    if attention is None or set(found) != set(wanted):
        raise _no(model, f"layer {name} is made of {', '.join(dict(layer.named_children()))}, not of Llama's parts")
    projections = [getattr(attention, f"{letter}_proj", None) for letter in "qkvo"]
    others = set(dict(attention.named_children())) - {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
    if not all(is_linear(m) for m in projections) or others:
        raise _no(model, f"the attention of layer {name} is {type(attention).__name__}, not four plain linear layers")
    if getattr(attention, "sliding_window", None) or getattr(model.config, "sliding_window", None):
        raise _no(model, f"layer {name} attends to a sliding window")
    return Layer(attention, *(found[part] for part in wanted[:1]), *(found[part] for part in wanted[1:]))


def _no(model: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"{type(model).__name__} cannot be decoded by the kernel: {reason}; models of the kind of Llama, Mixtral and "
        "Qwen3 can, dense or made sparse by moeify, and any other decodes by model.generate as it is"
    )
