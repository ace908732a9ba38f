"""Sparse models for tests of exporters, all of whose parts show in their logits."""

from __future__ import annotations

from functools import partial

import torch

from moeify import Recipe, sparsify
from moeify.find.where import ffn
from moeify.routers import TopK
from moeify.sparsify import recipes
from moeify.sparsify.make import fresh
from moeify.sparsify.shared import nothing
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
