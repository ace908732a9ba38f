"""Weights go to Megatron-Core's names and back without a bit lost, and its model computes with them."""

import pytest
import torch

from moeify.export.megatron import from_megatron, from_tensor_parts, part, tensor_part, to_megatron
from tiny_models import causal_lm, deepseek_v3, mixtral, qwen3_moe

BUILD = {"mixtral": mixtral, "qwen3_moe": qwen3_moe, "deepseek_v3": deepseek_v3}
TIED = {"tied": lambda: mixtral(tie_word_embeddings=True), "no_q_lora": lambda: deepseek_v3(q_lora_rank=None)}
LAYOUTS = ["local", "transformer_engine"]


def random_bits(model):
    """Weights of which no two are equal, NaN among them, in the dtypes of the model."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in model.state_dict().items():
        bits = torch.randint(-(2**31), 2**31 - 1, tensor.shape, generator=generator, dtype=torch.int32)
        weights[name] = bits.view(torch.float32)
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*BUILD, *TIED])
def test_a_round_trip_loses_no_bit(name, layout):
    model = (BUILD | TIED)[name]()
    weights = random_bits(model)
    back = from_megatron(to_megatron(weights, model.config, layout), model.config, layout)
    assert back.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(back[key].view(torch.int32), tensor.view(torch.int32)), key


def test_names_are_those_of_megatron():
    local, fused = (to_megatron(deepseek_v3().state_dict(), deepseek_v3().config, layout) for layout in LAYOUTS)
    assert local["decoder.layers.1.mlp.experts.local_experts.7.linear_fc1.weight"].shape == (32, 32)
    assert fused["decoder.layers.1.mlp.experts.linear_fc1.weight7"].shape == (32, 32)
    for weights in (local, fused):
        assert weights["decoder.layers.1.mlp.router.expert_bias"].shape == (8,)
        assert weights["decoder.layers.1.mlp.shared_experts.linear_fc2.weight"].shape == (32, 16)
    assert "decoder.layers.0.pre_mlp_layernorm.weight" in local
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in fused


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_expert_parallel_rank_holds_its_experts_from_0(layout):
    model = qwen3_moe()
    weights = to_megatron(model.state_dict(), model.config, layout)
    second = part(weights, 1, 4)
    name = "local_experts.{}.linear_fc1.weight" if layout == "local" else "linear_fc1.weight{}"
    name = f"decoder.layers.1.mlp.experts.{name}"
    assert torch.equal(second[name.format(1)], weights[name.format(3)])
    assert name.format(2) not in second
    assert second["decoder.layers.1.mlp.router.weight"].shape == (8, 32)
    with pytest.raises(ValueError, match="8 experts cannot be shared evenly by 3 ranks"):
        part(weights, 0, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BUILD)
def test_slices_of_tensor_parallel_ranks_are_put_together_again_without_a_bit_lost(name, layout):
    model = BUILD[name]()
    whole = to_megatron(random_bits(model), model.config, layout)
    held = [tensor_part(whole, model.config, rank, 2) for rank in range(2)]
    first, second = ("local_experts.3.linear_fc{}.weight" if layout == "local" else "linear_fc{}.weight3",) * 2
    first, second = (f"decoder.layers.1.mlp.experts.{first}".format(n) for n in (1, 2))
    hidden = whole[first].shape[0] // 2
    gate, other = held[1][first].chunk(2)
    assert torch.equal(gate.view(torch.int32), whole[first][hidden // 2 : hidden].view(torch.int32))
    assert torch.equal(other.view(torch.int32), whole[first][-hidden // 2 :].view(torch.int32))
    assert torch.equal(held[1][second].view(torch.int32), whole[second][:, hidden // 2 :].view(torch.int32))
    joined = from_tensor_parts(held)
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[key].view(torch.int32), tensor.view(torch.int32)) for key, tensor in whole.items())
    experts = [tensor_part(whole, model.config, rank, 2, "experts") for rank in range(2)]
    assert experts[0]["embedding.word_embeddings.weight"] is whole["embedding.word_embeddings.weight"]
    assert from_tensor_parts(experts, "experts").keys() == whole.keys()


def test_ranks_that_cannot_share_tensors_are_refused():
    model = mixtral()
    weights = to_megatron(model.state_dict(), model.config)
    with pytest.raises(ValueError, match="2 groups of heads cannot be shared evenly by 3 ranks"):
        tensor_part(weights, model.config, 0, 3)
    held = [tensor_part(weights, model.config, rank, 2) for rank in range(2)]
    router = "decoder.layers.0.mlp.router.weight"
    with pytest.raises(ValueError, match=r"mlp.router.weight is whole on every rank, and not the same"):
        from_tensor_parts([held[0], held[1] | {router: 2 * weights[router]}])
    with pytest.raises(ValueError, match="different names"):
        from_tensor_parts([held[0], {}])


def test_nothing_is_lost_without_a_word():
    model = mixtral()
    weights = model.state_dict()
    with pytest.raises(ValueError, match=r"model.layers.0.extra would be lost"):
        to_megatron(weights | {"model.layers.0.extra": torch.ones(1)}, model.config)
    with pytest.raises(ValueError, match=r"mlp.gate.weight is missing"):
        to_megatron({k: v for k, v in weights.items() if "layers.1.mlp.gate" not in k}, model.config)
    with pytest.raises(ValueError, match=r"layers.0.input_layernorm.weight is missing"):
        from_megatron(to_megatron(weights, model.config, "transformer_engine"), model.config)
    with pytest.raises(ValueError, match=r"layout='grouped' is not known"):
        to_megatron(weights, model.config, "grouped")
    with pytest.raises(ValueError, match=r"llama have no rules"):
        to_megatron({"model.embed_tokens.weight": 0 * weights["lm_head.weight"], **weights}, causal_lm("llama").config)
