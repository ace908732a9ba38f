"""The tests that transformers runs on every model, for tiny models of its MoE families.

`run.py` copies this file into the tests of a source distribution of transformers: that holds the common tests, but not
the files of the families, whose sizes stand here.
"""

from __future__ import annotations

import unittest
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoConfig, PretrainedConfig

from .test_modeling_common import ModelTesterMixin, ids_tensor

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "hidden_act": "silu", "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 32, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"]


class Tester:
    """What the common tests ask a family for: sizes, a configuration, a batch."""

    batch_size, seq_length, is_training = 13, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 2

    def __init__(self, family: str) -> None:
        self.family = family

    def get_config(self) -> PretrainedConfig:
        return AutoConfig.for_model(self.family, **SIZES)

    def prepare_config_and_inputs_for_common(self) -> tuple[PretrainedConfig, dict[str, Any]]:
        ids = ids_tensor([self.batch_size, self.seq_length], SIZES["vocab_size"])
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


def _tests_of(family: str) -> type:
    config = type(AutoConfig.for_model(family))

    def set_up(self: Any) -> None:
        self.model_tester = Tester(family)

    classes = (MODEL_MAPPING[config], MODEL_FOR_CAUSAL_LM_MAPPING[config])
    parts = {"all_model_classes": classes, "setUp": set_up, "__module__": __name__}
    return type(f"Test_{family}", (ModelTesterMixin, unittest.TestCase), parts)


globals().update({f"Test_{family}": _tests_of(family) for family in FAMILIES})
