"""Models are saved after `fast_decode` and `quantize_experts`, and loaded with the same logits."""

import json
from copy import deepcopy

import pytest
import torch
import transformers

from moeify.compress import quantize_experts
from moeify.experts.quantized import Quantized
from moeify.kernels.cpu import cpp
from moeify.serve import fast_decode, plain_decode
from moeify.sparsify import Recipe, sparsify
from moeify.store import load, save

SIZES = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.arange(1, 13).view(2, 6)
needs_kernel = pytest.mark.skipif(cpp.why_not() is not None, reason="there is no C++ kernel here")


def dense(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **options)).eval()


def tied():
    return dense(tie_word_embeddings=True)


def sparse():
    return sparsify(dense(), Recipe(num_experts=4), verbose=False).eval()


def mixtral():
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config).eval()


@torch.no_grad()
def logits(model):
    return plain_decode(model)(IDS).logits


@needs_kernel
def test_a_sparse_model_is_saved_after_fast_decode_as_before(tmp_path):
    model = fast_decode(sparse())
    save(model, tmp_path)
    torch.testing.assert_close(logits(load(tmp_path)), logits(model), rtol=0, atol=0)


@needs_kernel
@pytest.mark.parametrize("make", [dense, tied, mixtral])
def test_save_pretrained_works_after_fast_decode(make, tmp_path):
    model = make()
    before = logits(model)
    fast_decode(model).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path)), before, rtol=0, atol=0)


@needs_kernel
def test_a_state_dict_is_no_larger_after_fast_decode(tmp_path):
    model = sparse()
    torch.save(model.state_dict(), tmp_path / "before")
    torch.save(fast_decode(model).state_dict(), tmp_path / "after")
    before, after = ((tmp_path / name).stat().st_size for name in ("before", "after"))
    assert after < 1.1 * before


@needs_kernel
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("make", [dense, tied, mixtral, sparse])
def test_a_model_quantised_for_decoding_is_saved_with_its_quantisation(make, bits, tmp_path):
    model = fast_decode(make(), bits=bits)
    save(model, tmp_path)
    again = load(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    assert fast_decode(again).generate(IDS[:, :3], max_new_tokens=4, do_sample=False).shape[1] == 7


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_experts_are_saved_and_loaded_bit_for_bit(bits, dtype, tmp_path):
    model = quantize_experts(sparse().to(dtype), bits, group_size=32)
    save(model, tmp_path)
    again = load(tmp_path)
    again.model.rotary_emb = model.model.rotary_emb  # `to` has rounded its frequencies, which no file holds
    assert torch.equal(logits(again), logits(model))
    assert sum(isinstance(part, Quantized) for part in again.modules()) == 2
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["quantization"][0] == {"module": "model.layers.0.mlp.experts", "bits": bits, "group_size": 32}


def test_save_pretrained_is_refused_where_from_pretrained_would_read_random_weights(tmp_path):
    model = quantize_experts(sparse())
    for each in (model, deepcopy(model)):
        with pytest.raises(ValueError, match=r"write them by moeify\.store\.save\(model, folder\)"):
            each.save_pretrained(tmp_path)
    save(model, tmp_path)
    with pytest.raises(ValueError, match="from_pretrained would not know the quantised weights"):
        load(tmp_path).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"module": "model.layers.7"}, "there is no module to quantise"),
        ({"module": "model.norm"}, "model.norm is a LlamaRMSNorm, and only linear layers and experts"),
        ({"module": "lm_head", "bits": 3}, "weights of 3 bits"),
        ("lm_head", "there is no module to quantise"),
    ],
)
def test_a_damaged_record_of_the_quantisation_is_named(entry, reason, tmp_path):
    save(quantize_experts(sparse()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization": [entry]}), "utf-8")
    (tmp_path / "SHA256.json").unlink()
    with pytest.raises(ValueError, match=reason):
        load(tmp_path)
