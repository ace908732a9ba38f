"""Tiny models of transformers with random weights: built offline, the same on every call.

`TINY["mixtral"]()` builds one; `inputs(model)` gives what it can be called with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel

VOCABULARY = 256
Builder = Callable[[], PreTrainedModel]

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_WIDE_WEIGHTS = 0.2  # transformers' 0.02 would make every router of so narrow a model undecided


def _seeded(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def causal_lm(model_type: str, **config: Any) -> PreTrainedModel:
    """A decoder of a family of transformers, tiny unless `config` says otherwise."""
    settings = _DECODER | {"initializer_range": _WIDE_WEIGHTS} | config
    return _seeded(lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)))


def mixtral(**config: Any) -> PreTrainedModel:
    return causal_lm("mixtral", **{"num_local_experts": 4, "num_experts_per_tok": 2} | config)


def qwen3_moe(**config: Any) -> PreTrainedModel:
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
    return causal_lm("qwen3_moe", **sizes | config)


def olmoe(**config: Any) -> PreTrainedModel:
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 16, "num_key_value_heads": 4}
    return causal_lm("olmoe", **sizes | config)


def deepseek_v3(**config: Any) -> PreTrainedModel:
    sizes = {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
    }
    return causal_lm("deepseek_v3", **_LATENT_ATTENTION | sizes | config)


def gpt_oss(**config: Any) -> PreTrainedModel:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "sliding_window": 16}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return causal_lm("gpt_oss", **sizes | rope | config)


def gpt2() -> PreTrainedModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, **special)
    return _seeded(lambda: GPT2LMHeadModel(config))


def opt() -> PreTrainedModel:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "pad_token_id": 0}
    return _seeded(lambda: OPTForCausalLM(OPTConfig(**_TEXT | sizes)))


def t5(**config: Any) -> PreTrainedModel:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return _seeded(lambda: T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes | config)))


def bart() -> PreTrainedModel:
    from transformers import BartConfig, BartForConditionalGeneration

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        forced_eos_token_id=None,
        **special,
    )
    return _seeded(lambda: BartForConditionalGeneration(config))


def masked_lm(model_type: str, **config: Any) -> PreTrainedModel:
    """An encoder of a family of transformers that fills in masked tokens."""
    from transformers import AutoModelForMaskedLM

    settings = _TEXT | {"max_position_embeddings": 128} | config
    return _seeded(lambda: AutoModelForMaskedLM.from_config(AutoConfig.for_model(model_type, **settings)))


def image_classifier(model_type: str, **config: Any) -> PreTrainedModel:
    """A vision encoder of a family of transformers with ten classes."""
    settings = _VISION | {"num_labels": 10} | config
    return _seeded(lambda: AutoModelForImageClassification.from_config(AutoConfig.for_model(model_type, **settings)))


def bert() -> PreTrainedModel:
    from transformers import BertConfig, BertForMaskedLM

    return _seeded(lambda: BertForMaskedLM(BertConfig(**_TEXT, max_position_embeddings=128)))


def vit() -> PreTrainedModel:
    from transformers import ViTConfig, ViTForImageClassification

    return _seeded(lambda: ViTForImageClassification(ViTConfig(**_VISION, num_labels=10)))


def clip() -> PreTrainedModel:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config=_TEXT | {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=_VISION,
        projection_dim=16,
    )
    return _seeded(lambda: CLIPModel(config))


def whisper() -> PreTrainedModel:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=16,
        max_source_positions=16,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return _seeded(lambda: WhisperForConditionalGeneration(config))


@torch.no_grad()
def widened(model: Any) -> Any:
    """The model with weights so large, biases included, that every part of it shows in its output."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


SPARSE: dict[str, Builder] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "deepseek_v3": deepseek_v3,
    "gpt_oss": gpt_oss,
}
DENSE: dict[str, Builder] = {
    "llama": lambda: causal_lm("llama"),
    "mistral": lambda: causal_lm("mistral"),
    "qwen3": lambda: causal_lm("qwen3"),
    "gemma": lambda: causal_lm("gemma"),
    "gpt2": gpt2,
    "opt": opt,
    "phi3": lambda: causal_lm("phi3"),
    "t5": t5,
    "t5_gated": lambda: t5(feed_forward_proj="gated-gelu"),
    "bart": bart,
    "bert": bert,
    "vit": vit,
    "clip": clip,
    "whisper": whisper,
}
TINY: dict[str, Builder] = SPARSE | DENSE


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Token ids without padding and other special tokens."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs(model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Keyword arguments that a model of `TINY` can be called with, labels included where it takes them."""
    ids = tokens(batch, length, seed)
    noise = torch.Generator().manual_seed(seed)
    match model.main_input_name, model.config.model_type:
        case "pixel_values", _:
            return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=noise), "labels": ids[:, 0] % 10}
        case _, "clip":
            ids = torch.cat([ids[:, 1:], torch.full((batch, 1), 2)], dim=1)
            return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 32, 32, generator=noise)}
        case "input_features", _:
            return {"input_features": torch.randn(batch, 16, 32, generator=noise), "labels": ids}
        case _:
            return {"input_ids": ids, "labels": ids}
