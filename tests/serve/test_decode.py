from __future__ import annotations

import copy
from functools import partial

import accelerate
import pytest
import torch
import transformers
from torch import nn

from moeify.find import every
from moeify.kernels.cpu import cpp
from moeify.record import record
from moeify.routers import ExpertGroups, TopK
from moeify.serve import fast_decode, plain_decode
from moeify.sparsify import Recipe, dense, fresh, sparsify

SIZES = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
QWEN = {"moe_intermediate_size": 48, "head_dim": 24, "num_experts": 8, "num_experts_per_tok": 2}


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(**SIZES, **QWEN, decoder_sparse_step=2, norm_topk_prob=False)
    return transformers.Qwen3MoeForCausalLM(config)


def olmoe() -> nn.Module:
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def qwen2() -> nn.Module:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=True))


def sparsified() -> nn.Module:
    return sparsify(llama(), Recipe(where=every(2), num_experts=4), verbose=False)


def with_shared_network() -> nn.Module:
    return sparsify(llama(), Recipe(where=every(2), num_experts=4, experts=fresh, shared=dense), verbose=False)


FAMILIES = [mixtral, qwen3_moe, olmoe, llama, qwen2, sparsified, with_shared_network]
needs_kernel = pytest.mark.skipif(cpp.why_not() is not None, reason="there is no C++ kernel here")


def made(family, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = family().to(dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 else nn.init.normal_(parameter, 1, 0.1)
    model.generation_config.eos_token_id = None
    return model


def prompts() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 101, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # padded on the left
    return {"input_ids": ids, "attention_mask": mask}


def tokens(model: nn.Module, inputs: dict[str, torch.Tensor], **settings) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=20, **({"do_sample": False} | settings))


def steps_of(model: nn.Module) -> int:
    """How many steps of a generation go through the kernel."""
    decode, count = model.forward, 0
    fast = decode.fast

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return fast(*args, **kwargs)

    decode.fast = counted
    tokens(model, prompts())
    decode.fast = fast
    return count


@needs_kernel
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_generates_the_tokens_of_the_model(family):
    model, inputs = made(family), prompts()
    expected = tokens(model, inputs)
    assert torch.equal(tokens(fast_decode(model), inputs), expected)
    assert steps_of(model) == 19


@needs_kernel
@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_every_step_scores_tokens_as_the_model_does(family):
    model, inputs = made(family, torch.bfloat16), prompts()
    settings = {"return_dict_in_generate": True, "output_logits": True}
    ours = tokens(fast_decode(copy.deepcopy(model)), inputs, **settings)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 20, dtype=torch.int64)], 1)
    with torch.no_grad():
        theirs = model.float()(ours.sequences, attention_mask=mask).logits[:, 6:-1]
    error = (torch.stack(ours.logits, 1) - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    assert error.median() < 0.05  # a token that is routed otherwise differs by more


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("family", [mixtral, sparsified, llama])
def test_quantised_steps_agree_with_the_quantised_model(family, bits, dtype):
    model = fast_decode(made(family, dtype), bits=bits)
    decode, ids = model.forward, torch.randint(5, 101, (8, 6))
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        ours = model(ids[:, 5:], past_key_values=cache).logits
        theirs = decode.slow(ids).logits[:, -1:].float()
    error = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    assert error.median() < (1e-4 if dtype == torch.float32 else 0.05)


@needs_kernel
def test_eight_bits_stay_near_the_model_and_four_bits_less_so():
    ids, errors = torch.randint(5, 101, (8, 6)), []
    for bits in (16, 8, 4):
        cache = transformers.DynamicCache()
        model = fast_decode(made(llama, torch.bfloat16), bits=bits)
        with torch.no_grad():
            exact = made(llama)(ids).logits[:, -1]
            model(ids[:, :5], past_key_values=cache)
            errors.append(
                ((model(ids[:, 5:], past_key_values=cache).logits[:, -1] - exact).norm() / exact.norm()).item()
            )
    assert errors[0] < 0.02 < errors[2]
    assert errors[1] < 0.05
    assert errors[2] < 0.4


@needs_kernel
def test_beams_and_sampling_see_the_same_logits():
    model, inputs = made(mixtral), prompts()
    expected = tokens(model, inputs, num_beams=3)
    torch.manual_seed(1)
    sampled = tokens(model, inputs, do_sample=True)
    fast_decode(model)
    assert torch.equal(tokens(model, inputs, num_beams=3), expected)
    torch.manual_seed(1)
    assert torch.equal(tokens(model, inputs, do_sample=True), sampled)


@needs_kernel
def test_a_cache_grows_beyond_its_first_room():
    model, ids = made(llama), torch.randint(5, 101, (1, 250))
    expected = tokens(model, {"input_ids": ids})
    assert torch.equal(tokens(fast_decode(model), {"input_ids": ids}), expected)


@needs_kernel
def test_a_router_that_the_kernel_does_not_know_is_called():
    recipe = Recipe(where=every(2), num_experts=4, router=partial(TopK, expert_groups=ExpertGroups(count=2, keep=1)))
    model = sparsify(made(llama), recipe, verbose=False)
    inputs = prompts()
    expected = tokens(model, inputs)
    assert torch.equal(tokens(fast_decode(model), inputs), expected)
    assert steps_of(model) == 19


@needs_kernel
def test_what_asks_for_more_than_logits_is_the_models_own():
    model = fast_decode(made(sparsified))
    cache = transformers.DynamicCache()
    with torch.no_grad(), record(model) as seen:
        model(torch.ones(1, 4, dtype=torch.int64), past_key_values=cache)
        out = model(torch.ones(1, 1, dtype=torch.int64), past_key_values=cache, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert seen
    assert next(iter(seen.values())).counts.sum() == 2


@needs_kernel
def test_weights_stay_the_parameters_that_they_were():
    model = made(mixtral)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    fast_decode(model)
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    assert plain_decode(model) is model
    assert "forward" not in vars(model)


@needs_kernel
def test_a_copy_decodes_by_its_own_weights():
    model, inputs = fast_decode(made(mixtral)), prompts()
    expected = tokens(model, inputs)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(tokens(other, inputs), expected)
    assert steps_of(other) == 19


def test_without_a_kernel_the_model_decodes_as_before_and_says_why(monkeypatch):
    monkeypatch.setenv("MOEIFY_CPP", "0")
    model, inputs = made(mixtral), prompts()
    expected = tokens(model, inputs)
    with pytest.warns(UserWarning, match="switched off by MOEIFY_CPP=0"):
        fast_decode(model)
    assert torch.equal(tokens(model, inputs), expected)


def test_a_model_of_another_kind_is_refused_in_words():
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=11))
    with pytest.raises(ValueError, match="no lm_head over a model with embed_tokens"):
        fast_decode(gpt)
    with pytest.raises(ValueError, match="fp32 or bf16 on a CPU"):
        fast_decode(made(llama).half())
    with pytest.raises(ValueError, match="3 bits are not supported"):
        fast_decode(made(llama), bits=3)


@needs_kernel
def test_a_model_that_computes_more_than_its_parts_say_is_refused():
    config = transformers.GraniteConfig(**SIZES, residual_multiplier=0.5)
    with pytest.raises(ValueError, match="computes something else than its parts say"):
        fast_decode(made(lambda: transformers.GraniteForCausalLM(config)))


@needs_kernel
@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("family", [sparsified, mixtral])
def test_a_fast_model_that_is_offloaded_computes_the_same(family, bits):
    model, ids = made(family), torch.arange(1, 7).view(1, 6)
    fast_decode(model, bits=bits)
    cached = model(ids[:, :5], use_cache=True).past_key_values
    step = model(ids[:, 5:], past_key_values=cached).logits
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    cached = model(ids[:, :5], use_cache=True).past_key_values
    torch.testing.assert_close(model(ids[:, 5:], past_key_values=cached).logits, step, rtol=1e-3, atol=1e-3)


def test_an_offloaded_model_is_not_made_fast():
    model = made(llama)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(ValueError, match=r"is offloaded, .*load the model into memory"):
        fast_decode(model)
