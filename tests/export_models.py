"""Sparse models for tests of exporters, all of whose parts show in their logits."""

from __future__ import annotations

from functools import partial

import torch
from transformers import JinaEmbeddingsV3Config, JinaEmbeddingsV3Model

from moeify import Recipe, sparsify
from moeify.find.where import ffn, last, odd
from moeify.routers import TopK, sigmoid
from moeify.sparsify import recipes
from moeify.sparsify.make import fresh
from moeify.sparsify.shared import dense, gated, nothing
from tiny_models import causal_lm, widened

LATENT = {"first_k_dense_replace": 9, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
          "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}  # fmt: skip
WHOLE_HEADS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}
BASES = {"deepseek_v3": LATENT, "stablelm": WHOLE_HEADS}


def sparse(base="llama", recipe="mixtral", **config):
    """A sparse model all of whose parts show in its logits, the selection biases included."""
    recipe = recipes[recipe] if isinstance(recipe, str) else recipe
    model = sparsify(causal_lm(base, **BASES.get(base, {}) | config), recipe, verbose=False)
    return shown(model)


def shown(model):
    widened(model)
    generator = torch.Generator().manual_seed(2)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    return model.eval()


FINER = partial(fresh, granularity=2)


def router(where=ffn, experts=FINER, shared=nothing, **options):
    """A recipe with a token choice of these options."""
    return Recipe(where=where, num_experts=4, router=partial(TopK, **options), experts=experts, shared=shared)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
SIGMOID = {"score": sigmoid, "selection_bias": True}
GGUF_CASES = [
    ("llama", "mixtral", {}, "llama"),
    ("llama", "mixtral", {"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": LLAMA3}, "llama"),
    ("llama", "olmoe", {"tie_word_embeddings": True}, "qwen2moe"),
    ("llama", router(normalize=False, shared=gated), {}, "qwen2moe"),
    ("llama", router(shared=dense), {}, "granitemoe"),
    ("granite", "mixtral", {"attention_multiplier": 0.2, "residual_multiplier": 0.7, "logits_scaling": 3.0,
                            "embedding_multiplier": 1.5}, "granitemoe"),
    ("llama", "deepseek", {}, "glm4moe"),
    ("llama", router(where=last(1), normalize=False, **SIGMOID), {}, "glm4moe"),
    ("qwen3", "matched", {"head_dim": 16, "rms_norm_eps": 0.1}, "glm4moe"),
    ("qwen3", "qwen3", {"num_key_value_heads": 1}, "qwen3moe"),
    ("ernie4_5", "matched", {}, "ernie4_5-moe"),
]  # fmt: skip
"""A base, a recipe and settings for every architecture of llama.cpp but OLMoE's, which no dense base becomes."""

UNSCALED = partial(TopK, k=2, normalize=False)
PLAIN = partial(fresh, bias=False)


def encoder(*, where=odd, router=UNSCALED, experts=PLAIN, act="gelu_pytorch_tanh", **recipe):
    """A sparse encoder with rotary positions, whose feed-forward networks have no gate."""
    torch.manual_seed(0)
    config = JinaEmbeddingsV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, hidden_act=act,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    model = JinaEmbeddingsV3Model(config, add_pooling_layer=False)
    made = Recipe(where=where, num_experts=4, router=router, experts=experts, **recipe)
    return shown(sparsify(model, made, verbose=False))
