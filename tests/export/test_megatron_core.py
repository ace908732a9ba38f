"""Megatron-Core's own model computes the logits of transformers with the converted weights; skipped where it is not."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("megatron.core")

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from moeify.export.megatron import from_megatron, to_megatron
from tiny_models import deepseek_v3, mixtral, qwen3_moe, tokens


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch, tmp_path):
    """Megatron-Core asks for a GPU in places that need none."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: None)
    monkeypatch.setattr(CudaRNGStatesTracker, "fork", lambda self, *name: contextlib.nullcontext())
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)  # undefined without Transformer Engine
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def settings(config):
    experts = ("num_local_experts", "n_routed_experts", "num_experts")
    return {
        "num_layers": config.num_hidden_layers, "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads, "ffn_hidden_size": config.intermediate_size,
        "layernorm_epsilon": config.rms_norm_eps, "normalization": "RMSNorm", "add_bias_linear": False,
        "gated_linear_unit": True, "activation_func": F.silu, "attention_dropout": 0.0, "hidden_dropout": 0.0,
        "num_moe_experts": next(n for name in experts if (n := getattr(config, name, None)) is not None),
        "moe_router_topk": config.num_experts_per_tok, "moe_router_load_balancing_type": "none",
        "moe_ffn_hidden_size": getattr(config, "moe_intermediate_size", config.intermediate_size),
        "moe_token_dispatcher_type": "allgather", "use_cpu_initialization": True, "params_dtype": torch.float32,
        "bias_activation_fusion": False, "masked_softmax_fusion": False, "bias_dropout_fusion": False,
        "apply_rope_fusion": False, "persist_layer_norm": False, "gradient_accumulation_fusion": False,
    }  # fmt: skip


def tensors(module):
    return {key for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}


def made(config):
    theirs = TransformerConfig(
        **settings(config), num_query_groups=config.num_key_value_heads, kv_channels=config.head_dim,
        qk_layernorm=config.model_type == "qwen3_moe",
    )  # fmt: skip
    spec = get_gpt_decoder_block_spec(theirs, use_transformer_engine=False, normalization="RMSNorm")
    return GPTModel(
        theirs, spec, vocab_size=config.vocab_size, max_sequence_length=128, position_embedding_type="rope",
        rotary_base=config.rope_parameters["rope_theta"], share_embeddings_and_output_weights=False,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
def test_the_model_of_megatron_has_the_logits_of_transformers(build):
    model = build()
    config, megatron = model.config, made(model.config)
    weights = to_megatron(model.state_dict(), config)
    assert tensors(megatron) == weights.keys()
    megatron.load_state_dict(weights, strict=False)  # which lacks _extra_state, of no tensor
    ids = tokens()
    places, mask = torch.arange(ids.shape[1]).expand_as(ids), torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
    with torch.no_grad():
        logits, wanted = megatron(ids, places, mask[None, None]), model(ids).logits
    assert (logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
    back = from_megatron(megatron.state_dict(), config)
    assert all(torch.equal(back[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("build", [mixtral, qwen3_moe])
def test_a_distributed_checkpoint_of_megatron_holds_the_weights_bit_for_bit(build, tmp_path):
    model = build()
    first, second = made(model.config), made(model.config)
    first.load_state_dict(to_megatron(model.state_dict(), model.config), strict=False)
    (tmp_path / "iter_0000001").mkdir()
    dist_checkpointing.save(first.sharded_state_dict(), str(tmp_path / "iter_0000001"))
    second.load_state_dict(dist_checkpointing.load(second.sharded_state_dict(), str(tmp_path / "iter_0000001")))
    back = from_megatron(second.state_dict(), model.config)
    assert all(torch.equal(back[key], tensor) for key, tensor in model.state_dict().items())


def test_the_layer_of_megatron_has_the_outputs_of_deepseek():
    """Experts, shared expert and a router with groups and a bias; the local spec of 0.16.1 has no latent attention."""
    model = deepseek_v3()
    config, block = model.config, model.model.layers[1].mlp
    with torch.no_grad():
        block.gate.e_score_correction_bias.normal_(0, 0.1)
    theirs = MLATransformerConfig(
        **settings(config), moe_shared_expert_intermediate_size=config.moe_intermediate_size * config.n_shared_experts,
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_pre_softmax=True,
        moe_router_num_groups=config.n_group, moe_router_group_topk=config.topk_group,
        moe_router_topk_scaling_factor=config.routed_scaling_factor,
    )  # fmt: skip
    spec = get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False)
    layer = build_module(spec, config=theirs, pg_collection=ProcessGroupCollection.use_mpu_process_groups()).eval()
    layer.set_layer_number(2)
    inside = "decoder.layers.1.mlp."
    weights = to_megatron(model.state_dict(), config)
    weights = {key.removeprefix(inside): tensor for key, tensor in weights.items() if key.startswith(inside)}
    assert tensors(layer) == weights.keys()
    layer.load_state_dict(weights, strict=False)
    x = torch.randn(2, 12, config.hidden_size)
    with torch.no_grad():
        outputs, wanted = layer(x), block(x)
    assert (outputs[0] - wanted).abs().max() < 1e-5 * wanted.abs().max()
