"""Encoders with rotary positions as llama.cpp's `nomic-bert-moe`, the only encoder with experts that a GGUF file holds.

The dense class with this attention and feed-forward networks without a gate is JinaEmbeddingsV3 of transformers. What
llama.cpp computes is the hidden state of every token: embeddings of texts, pooled or not.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.experts import FFN
from moeify.export.gguf_families import Architecture, Positions
from moeify.export.model_spec import ModelSpec, Unsupported
from moeify.export.routers import token_choice_of
from moeify.export.rules import Always, Field, Traits
from moeify.kernels.stacked import Plain
from moeify.layers import moe_layers
from moeify.moe import MoE
from moeify.store.config import architecture_of
from moeify.store.peft import has_adapters


@dataclass(frozen=True)
class FromTheSecond:
    """The second layer and every n-th after it are sparse, of experts as wide as the dense networks."""

    def write(self, value: tuple[int, ...], traits: Traits) -> dict[str, Any]:
        """n, from 2 on."""
        for n in range(2, traits["layers"] + 1):
            if value == tuple(range(1, traits["layers"], n)):
                return {"moe_every_n_layers": n}
        raise Unsupported(f"its sparse layers are the second and others at equal intervals (odd), of the model {value}")


NOMIC_BERT_MOE = Architecture(
    "nomic-bert-moe",
    {
        "positions": Field("context_length"), "norm_eps": Field("attention.layer_norm_epsilon"), "rope": Positions(),
        "activation": Always("gelu_tanh"), "expert_hidden": Field("feed_forward_length"),
        "sparse_layers": FromTheSecond(), "normalize": Always(False),
    },
    {"attention.causal": False, "pooling_type": 0},
    {"router": "ffn_gate_inp.weight", "up": "ffn_up_exps.weight", "down": "ffn_down_exps.weight"},
)  # fmt: skip
"""What llama.cpp computes."""
ROUNDING = 1e-3
"""The difference of hidden states, relative to the largest, of llama.cpp's GELU, a table in half precision."""

_LAYER = {
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "attn_output_norm", "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down", "post_mlp_layernorm": "layer_output_norm",
}  # fmt: skip
_OUTSIDE = {
    "embeddings.word_embeddings.weight": "model.embed_tokens.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.LayerNorm.weight": "token_embd_norm.weight",
    "embeddings.LayerNorm.bias": "token_embd_norm.bias",
}


def is_encoder(model: nn.Module) -> bool:
    """Whether a model is an encoder of the class that `nomic-bert-moe` can hold."""
    return getattr(architecture_of(model), "__name__", "") == "JinaEmbeddingsV3Model"


def encoder_spec(model: Any) -> ModelSpec:
    """Describe a sparse JinaEmbeddingsV3 in the terms of `nomic-bert-moe`.

    Raises:
        Unsupported: adapters, or sparse layers that the architecture cannot express.
    """
    if has_adapters(model):
        raise Unsupported("it has adapters of PEFT; merge them first: model = model.merge_and_unload()")
    config, layers = model.config, moe_layers(model)
    if not layers:
        raise Unsupported("it has no sparse layers of moeify")
    stored = {name: tensor.detach() for name, tensor in model.state_dict().items() if not name.startswith("pooler.")}
    tensors = {_OUTSIDE[name]: stored.pop(name) for name in _OUTSIDE}
    choices = {}
    for name, layer in layers.items():
        i = _layer_index(name)
        for inner in [key for key in stored if key.startswith(f"{name}.")]:
            del stored[inner]
        choices[i], parts = _parts(layer, config)
        tensors |= {f"layers.{i}.{part}": tensor.detach() for part, tensor in parts.items()}
    for i in range(config.num_hidden_layers):
        for kind in ("weight", "bias"):
            before = f"layers.{i}."
            tensors[f"blk.{i}.attn_qkv.{kind}"] = torch.cat(
                [stored.pop(f"{before}self_attn.{part}_proj.{kind}") for part in "qkv"]
            )
            for theirs, ours in _LAYER.items():
                if (tensor := stored.pop(f"{before}{theirs}.{kind}", None)) is not None:
                    tensors[f"blk.{i}.{ours}.{kind}"] = tensor
    if stored:
        raise Unsupported(f"it has no place for {', '.join(sorted(stored)[:3])}")
    first, *others = choices.values()
    if any(other != first for other in others):
        raise Unsupported("its sparse layers route alike, with as many experts; those of the model differ")
    return ModelSpec(_traits(config) | first | {"sparse_layers": tuple(sorted(choices))}, tensors)


def _traits(config: Any) -> dict[str, Any]:
    from transformers.activations import ACT2FN

    return {
        "vocabulary": config.vocab_size, "width": config.hidden_size, "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads, "positions": config.max_position_embeddings,
        "norm_eps": config.layer_norm_eps, "rope": {"partial_rotary_factor": 1.0, **config.rope_parameters},
        "head_dim": config.hidden_size // config.num_attention_heads, "token_types": config.type_vocab_size,
        "activation": "gelu_tanh" if _is_gelu_tanh(ACT2FN[config.hidden_act]) else config.hidden_act,
    }  # fmt: skip


def _is_gelu_tanh(activation: Callable[[Tensor], Tensor]) -> bool:
    x = torch.linspace(-6, 6, 97)
    return torch.allclose(activation(x), F.gelu(x, approximate="tanh"), rtol=0, atol=1e-6)


def _layer_index(name: str) -> int:
    if (found := re.fullmatch(r"layers\.(\d+)\.mlp", name)) is None:
        raise Unsupported(f"its sparse layer {name} is no whole feed-forward network (mlp)")
    return int(found[1])


def _parts(layer: MoE, config: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    choice, experts = token_choice_of(layer.router), layer.experts
    if layer.shared is not None or layer.memory is not None:
        raise Unsupported("its sparse layers have more than experts, those of nomic-bert-moe have experts only")
    if type(experts) is not FFN or not isinstance(experts.activation, Plain):
        raise Unsupported(f"its experts, {type(experts).__name__}, are not networks of two projections without a gate")
    (up, up_bias), (down, down_bias) = experts.up, experts.down
    if any(bias is not None and torch.any(bias) for bias in (up_bias, down_bias)):
        raise Unsupported("its experts have biases; make them without, as by partial(fresh, bias=False)")
    if up.shape[1] != config.intermediate_size:
        raise Unsupported(
            f"its experts are as wide as its dense networks, {config.intermediate_size}, the model's {up.shape[1]}"
        )
    if not _is_gelu_tanh(experts.activation.act):
        raise Unsupported(
            "its experts compute GELU in the form with tanh (gelu_pytorch_tanh), the model's another activation"
        )
    traits = choice.traits | {"num_experts": len(up), "expert_hidden": up.shape[1], "shared": None}
    return traits, {"router": choice.router, "up": up, "down": down}
