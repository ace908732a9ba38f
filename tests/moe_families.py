"""A tiny model of every MoE family that the installed transformers ships, built offline from a configuration."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

_SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": False, "use_cache": False, "initializer_range": 0.2,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "moe_intermediate_size": 16, "expert_ffn_hidden_size": 16, "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "n_shared_experts": 1, "num_shared_experts": 1,
    "n_group": 2, "topk_group": 1, "num_expert_group": 2,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "qk_head_dim": 16,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA = {
    "enable_moe_block": True, "global_head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
}  # fmt: skip
_SIZES_OF: dict[str, dict[str, Any]] = {
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2,
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2},
    "diffusion_gemma_text": _GEMMA,
    "doge": {"is_moe": True, "num_experts": 16},
    "dots3_note_text": {"num_hidden_layers": 2, "index_topk": 8, "index_head_dim": 8, "index_n_heads": 2},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 8], "rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]},
    },
    "gemma4_text": _GEMMA,
    "glm4v_moe_text": {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 0]}},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_expand": 2, "mamba_d_head": 8},
    "hy_v4_vl_text": {"rope_parameters": _ROPE | {"mrope_section": [2, 1, 1]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "mistral4": {
        "rope_parameters": _ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64},
    },
    "nllb-moe": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
    },
    "qwen4_exp_text": {
        "ngram_vocab_size_base": 64, "split_ngram_parts": 1, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2, "ple_embed_dim": 16,
    },
    "step3p5": {"sliding_window": 8, "share_expert_dim": 16, "num_sliding_attention_heads": 4},
    "switch_transformers": {
        "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
        "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 64,
    },
    "zaya": {"num_experts_per_tok": 1, "num_query_groups": 2},
}  # fmt: skip
FAMILIES = [
    "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "dbrx", "deepseek_ocr2_text",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "diffusion_gemma_text", "doge", "dots1",
    "dots3_note_text", "ernie4_5_moe", "ernie4_5_vl_moe_text", "exaone_moe", "flex_olmo", "flint", "gemma4_text",
    "glm4_moe", "glm4_moe_lite", "glm4v_moe_text", "glm5_next_text", "glm_moe_dsa", "gpt_oss", "granitemoe",
    "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "hy_v4_vl_text",
    "inkling_text", "inkling2_text", "inkling2_loop_text", "jamba", "jetmoe", "kimi_linear", "kolibri1", "laguna",
    "lara_mini", "lfm2_moe", "llama4_text", "longcat_flash", "mellum", "mimo_v2_flash", "minimax", "minimax_m2",
    "minimax_m3_vl_text", "mistral4", "mistral_large4_text", "mixtral", "muse_spark_text", "nemotron_h", "nllb-moe",
    "olmoe", "openai_privacy_filter", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
    "qwen3_omni_moe_text", "qwen3_vl_moe_text", "qwen4_exp_text", "solar_open", "step3p5", "switch_transformers",
    "unlimited_ocr_text", "zaya",
]  # fmt: skip

NOT_BUILT = {"vitpose_backbone": "the caller names the expert, that of a data set: nothing is routed"}


def build(model_type: str, **sizes: Any) -> PreTrainedModel:
    """A model of a family with random weights, the same on every call."""
    config = AutoConfig.for_model(model_type, **{**_SIZES, **_SIZES_OF.get(model_type, {}), **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _model_class(config)(config).eval()


def inputs(model: PreTrainedModel, batch: int = 2, length: int = 8) -> dict[str, torch.Tensor]:
    """What it can be called with."""
    ids = torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(0))
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if encoder_decoder else {})


def _model_class(config: PretrainedConfig) -> Any:
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    found = [
        part
        for part in vars(module).values()
        if isinstance(part, type) and issubclass(part, PreTrainedModel) and part.config_class is type(config)
    ]
    return next(
        part
        for end in ("ForCausalLM", "ForConditionalGeneration", "Model")
        for part in found
        if part.__name__.endswith(end) and "PreTrained" not in part.__name__
    )


def folders() -> set[str]:
    """The folders of transformers' models that the families come from."""
    return {CONFIG_MAPPING[family].__module__.split(".")[-2] for family in FAMILIES}
