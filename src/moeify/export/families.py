"""The table of decoder classes of transformers, dense and sparse: what each computes, config fields and tensor names.

A row lists the differences from Llama without biases. The same row reads a model and writes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from moeify.export.attention_rules import AttentionScale, HeadDim, HeadNorm, Latent, OneWindow, Rope, Windows
from moeify.export.layer_rules import (
    AllSparse,
    DenseFirst,
    DenseListed,
    EveryFew,
    GreedyGroups,
    Groups,
    SharedCount,
    SharedWidth,
)
from moeify.export.rules import Always, Field, Rule

DECODER: Mapping[str, Rule] = MappingProxyType({
    "vocabulary": Field("vocab_size"),
    "width": Field("hidden_size"),
    "layers": Field("num_hidden_layers"),
    "heads": Field("num_attention_heads"),
    "kv_heads": Field("num_key_value_heads"),
    "head_dim": HeadDim(),
    "activation": Field("hidden_act"),
    "positions": Field("max_position_embeddings"),
    "norm_eps": Field("rms_norm_eps"),
    "rope": Rope(),
    "tied": Field("tie_word_embeddings"),
    "pad": Field("pad_token_id"),
    "bos": Field("bos_token_id"),
    "eos": Field("eos_token_id"),
    "init_std": Field("initializer_range"),
    "attention_dropout": Field("attention_dropout"),
    "norm": Always("rms"),
    "norms": Always("before"),
    "query_key_norm": Always(None),
    "rope_pairs": Always("halves"),
    "qkv_bias": Always(False),
    "o_bias": Always(False),
    "ffn_bias": Always(False),
    "head_bias": Always(False),
    "windows": Always(None),
    "clip_qkv": Always(None),
    "latent": Always(None),
    "parallel": Always(False),
    "attention_scale": Always(None),
    "embedding_scale": Always(1.0),
    "residual_scale": Always(1.0),
    "logits_divisor": Always(1.0),
    "sparse_layers": Always(()),
    "ffn_hidden": Field("intermediate_size"),
})  # fmt: skip
"""The traits of a decoder, and how the config of Llama without biases stores them."""

EXPERTS: Mapping[str, Rule] = MappingProxyType({
    "ffn_hidden": Always(None),
    "num_experts": Field("num_local_experts"),
    "k": Field("num_experts_per_tok"),
    "expert_hidden": Field("intermediate_size"),
    "sparse_layers": AllSparse(),
    "score": Always("softmax"),
    "normalize": Always(True),
    "scale": Always(1.0),
    "selection_bias": Always(False),
    "groups": Always(None),
    "epsilon": Always(None),
    "shared": Always(None),
})  # fmt: skip
"""The traits of sparse layers, and how the config of Mixtral stores them."""

Names = dict[str, str | tuple[str, str]]
MIXTRAL: Names = {
    "router": "mlp.gate.weight",
    "gate_up": "mlp.experts.gate_up_proj",
    "down": "mlp.experts.down_proj",
}
SHARED_EXPERTS: Names = MIXTRAL | {
    "selection_bias": "mlp.gate.e_score_correction_bias",
    "shared_gate_up": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "shared_down": "mlp.shared_experts.down_proj.weight",
}


@dataclass(frozen=True)
class Family:
    """A model class of transformers with a language-modelling head.

    Attributes:
        model_type: the `model_type` of its config.
        title: its display name.
        differs: the traits in which it differs from Llama, or a sparse class from Mixtral.
        names: of the tensors of a sparse layer, within the layer; empty for a dense class. A pair names the gate and
            the up projection, where they are stored apart.
        without_effect: fields that change no logits in evaluation.
        settings: fields that are written as they are.
    """

    model_type: str
    title: str
    differs: Mapping[str, Rule] = field(default_factory=dict)
    names: Names = field(default_factory=dict)
    without_effect: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rules(self) -> dict[str, Rule]:
        """How its config stores every trait."""
        return {**DECODER, **(EXPERTS if self.names else {}), **self.differs}

    @property
    def fields(self) -> set[str]:
        """Every field of its configuration that the row covers."""
        ruled = {name for rule in self.rules.values() for name in rule.fields}
        return ruled | set(self.without_effect) | set(self.settings) | _WITHOUT_EFFECT


_WITHOUT_EFFECT = {"use_cache", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}
_BIASES = {"qkv_bias": Field("attention_bias"), "o_bias": Field("attention_bias")}
_GRANITE = _BIASES | {
    "attention_scale": AttentionScale("attention_multiplier"),
    "embedding_scale": Field("embedding_multiplier"),
    "residual_scale": Field("residual_multiplier"),
    "logits_divisor": Field("logits_scaling"),
}
_OLMO2 = _BIASES | {"norms": Always("after"), "query_key_norm": Always("width")}
_ERNIE = {
    "qkv_bias": Field("use_bias"), "o_bias": Field("use_bias"), "ffn_bias": Field("use_bias"),
    "head_bias": Field("use_bias"), "rope_pairs": Always("neighbours"), "attention_dropout": Always(0.0),
}  # fmt: skip
_QWEN = {
    "num_experts": Field("num_experts"),
    "expert_hidden": Field("moe_intermediate_size"),
    "ffn_hidden": Field("intermediate_size"),
    "sparse_layers": DenseListed(),
    "normalize": Field("norm_topk_prob"),
}
_DEEPSEEK = _BIASES | {"latent": Latent()}
_DEEPSEEK_EXPERTS = {
    "num_experts": Field("n_routed_experts"),
    "expert_hidden": Field("moe_intermediate_size"),
    "ffn_hidden": Field("intermediate_size"),
    "sparse_layers": DenseFirst(),
    "score": Always("sigmoid"),
    "normalize": Field("norm_topk_prob"),
    "scale": Field("routed_scaling_factor"),
    "selection_bias": Always(True),
    "groups": Groups("top2"),
    "shared": SharedCount("n_shared_experts"),
}

DENSE: Mapping[str, Family] = MappingProxyType({family.model_type: family for family in (
    Family("llama", "Llama", {**_BIASES, "ffn_bias": Field("mlp_bias")}, without_effect=("pretraining_tp",)),
    Family("mistral", "Mistral", {"windows": OneWindow()}),
    Family("qwen2", "Qwen2", {"qkv_bias": Always(True), "windows": Windows()}),
    Family("qwen3", "Qwen3", {**_BIASES, "query_key_norm": Always("head"), "windows": Windows()}),
    Family("olmo2", "OLMo 2", _OLMO2),
    Family("granite", "Granite", {**_GRANITE, "ffn_bias": Field("mlp_bias")}),
    Family("ernie4_5", "Ernie 4.5", _ERNIE),
    Family("stablelm", "StableLM", {
        "norm": Always("layer"), "norm_eps": Field("layer_norm_eps"), "qkv_bias": Field("use_qkv_bias"),
        "parallel": Field("use_parallel_residual"), "query_key_norm": HeadNorm("qk_layernorm"),
        "rope": Rope(partial=True),
    }, without_effect=("hidden_dropout",)),
    Family("deepseek_v3", "DeepSeek-V3", _DEEPSEEK, without_effect=("pretraining_tp", "num_mtp_layers")),
)})  # fmt: skip
"""Dense classes whose sparse versions can be exported; DeepSeek-V3 among them, where all its layers are dense."""

SPARSE: Mapping[str, Family] = MappingProxyType({family.model_type: family for family in (
    Family("mixtral", "Mixtral", {"windows": OneWindow()}, MIXTRAL),
    Family("qwen2_moe", "Qwen2-MoE", {
        **_QWEN, "qkv_bias": Field("qkv_bias"), "windows": Windows(),
        "shared": SharedWidth("shared_expert_intermediate_size", "gated", always=True),
    }, MIXTRAL | {
        "shared_gate_up": ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
        "shared_down": "mlp.shared_expert.down_proj.weight",
        "shared_gate": "mlp.shared_expert_gate.weight",
    }),
    Family("qwen3_moe", "Qwen3-MoE", {
        **_QWEN, **_BIASES, "query_key_norm": Always("head"), "windows": OneWindow("use_sliding_window"),
    }, MIXTRAL),
    Family("olmoe", "OLMoE", {
        **_BIASES, "query_key_norm": Always("width"), "clip_qkv": Field("clip_qkv"),
        "num_experts": Field("num_experts"), "normalize": Field("norm_topk_prob"),
    }, MIXTRAL),
    Family("flex_olmo", "FlexOlmo", {
        **_OLMO2, "num_experts": Field("num_experts"), "normalize": Field("norm_topk_prob"),
    }, MIXTRAL),
    Family("granitemoeshared", "GraniteMoeShared", {
        **_GRANITE, "shared": SharedWidth("shared_intermediate_size", "plain"),
    }, {
        "router": "block_sparse_moe.router.weight",
        "gate_up": "block_sparse_moe.experts.gate_up_proj",
        "down": "block_sparse_moe.experts.down_proj",
        "shared_gate_up": "shared_mlp.input_linear.weight",
        "shared_down": "shared_mlp.output_linear.weight",
    }),
    Family("dots1", "Dots1", {
        **_DEEPSEEK_EXPERTS, **_BIASES, "query_key_norm": Always("head"), "windows": Windows(("max_window_layers",)),
    }, SHARED_EXPERTS),
    Family("glm4_moe", "GLM4-MoE", {
        **_DEEPSEEK_EXPERTS, "qkv_bias": Field("attention_bias"), "rope": Rope(partial=True),
        "query_key_norm": HeadNorm("use_qk_norm"),
    }, SHARED_EXPERTS, settings={"num_mtp_layers": 0}),
    Family("ernie4_5_moe", "Ernie4.5-MoE", {
        **_ERNIE, "num_experts": Field("moe_num_experts"), "k": Field("moe_k"),
        "expert_hidden": Field("moe_intermediate_size"), "ffn_hidden": Field("intermediate_size"),
        "sparse_layers": EveryFew(), "selection_bias": Always(True),
        "shared": SharedCount("moe_num_shared_experts", always=False),
    }, SHARED_EXPERTS | {"selection_bias": "mlp.gate.moe_statics.e_score_correction_bias"},
       without_effect=("moe_norm_min",)),
    Family("deepseek_v3", "DeepSeek-V3", {**_DEEPSEEK, **_DEEPSEEK_EXPERTS}, SHARED_EXPERTS,
           without_effect=("pretraining_tp",), settings={"num_mtp_layers": 0}),
    Family("deepseek_v2", "DeepSeek-V2", {
        **_BIASES, "latent": Latent(interleaved=True), **_DEEPSEEK_EXPERTS, "ffn_bias": Field("mlp_bias"),
        "score": Always("softmax"), "normalize": Always(False), "selection_bias": Always(False),
        "groups": GreedyGroups(),
    }, {part: name for part, name in SHARED_EXPERTS.items() if part != "selection_bias"},
       without_effect=("pretraining_tp", "norm_topk_prob")),
    Family("minimax_m2", "MiniMax-M2", {
        "query_key_norm": Always("width"), "rope": Rope(partial=True), "score": Always("sigmoid"),
        "selection_bias": Always(True),
    }, MIXTRAL | {"selection_bias": "mlp.e_score_correction_bias"}),
    Family("phimoe", "PhiMoE", {
        **_BIASES, "norm": Always("layer"), "windows": OneWindow(), "rope": Rope(scaled=False),
        "score": Always("sparsemixer"), "normalize": Always(False), "epsilon": Field("router_jitter_noise"),
        "head_bias": Field("lm_head_bias"),
    }, MIXTRAL | {"router": "mlp.router.weight"}, without_effect=("input_jitter_noise",)),
)})  # fmt: skip
"""Classes with experts, in the order in which they are tried."""
