"""Write models of the kind of Llama and Mixtral as GGUF files for the tools of llama.cpp, without a vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
from torch import Tensor, nn


def write(model: nn.Module, file: Path) -> None:
    """Write a model; matrices in bf16, norms and routers in fp32."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    if hasattr(config, "num_local_experts"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    for name, tensor in tensors(model):
        numbers = tensor.detach().float().numpy()
        if numbers.ndim > 1 and "ffn_gate_inp" not in name:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors by llama.cpp's names.

    The rows of queries and keys stay in transformers' order, which turns other pairs of coordinates than llama.cpp
    does: the file is made to be timed, not read.
    """
    body = model.model
    yield "token_embd.weight", body.embed_tokens.weight
    yield "output_norm.weight", body.norm.weight
    yield "output.weight", model.lm_head.weight
    for i, layer in enumerate(body.layers):
        for theirs, ours in [("attn_norm", layer.input_layernorm), ("ffn_norm", layer.post_attention_layernorm)]:
            yield f"blk.{i}.{theirs}.weight", ours.weight
        for theirs, ours in zip(("q", "k", "v", "output"), "qkvo", strict=True):
            yield f"blk.{i}.attn_{theirs}.weight", getattr(layer.self_attn, f"{ours}_proj").weight
        if hasattr(layer.mlp, "experts"):
            gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
            yield f"blk.{i}.ffn_gate_inp.weight", layer.mlp.gate.weight
            yield f"blk.{i}.ffn_gate_exps.weight", gate
            yield f"blk.{i}.ffn_up_exps.weight", up
            yield f"blk.{i}.ffn_down_exps.weight", layer.mlp.experts.down_proj
        else:
            for part in ("gate", "up", "down"):
                yield f"blk.{i}.ffn_{part}.weight", getattr(layer.mlp, f"{part}_proj").weight
