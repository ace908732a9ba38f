"""What `sparsify` promises: refusals in words that change nothing, padding left out, and a model like any other."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from moeify import MoE, record
from moeify.data.claim_files import data_file
from moeify.find import modules, named
from moeify.origin import Origin
from moeify.routers import TopK, sigmoid
from moeify.sparsify import Recipe, copies, dense, fresh, frozen, gated, sparsify, splits
from plain_models import blocks, output, sparse_layers
from tiny_models import DENSE, inputs, tokens, widened

COPIES = Recipe(num_experts=4)
SWITCH = partial(TopK, k=1, normalize=False)
PER_GROUP = partial(TopK, per="sequence")


def make(family: str, recipe: Recipe = COPIES, **options) -> nn.Module:
    return sparsify(widened(DENSE[family]()), recipe, verbose=False, **options)


def hooks(model):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


REFUSED = {
    "copies under Switch weights": ("llama", Recipe(router=SWITCH), "do not sum to 1.*normalize=True"),
    "copies under OLMoE weights": ("llama", Recipe(router=partial(TopK, normalize=False)), "do not sum to 1"),
    "copies under scaled weights": ("llama", Recipe(router=partial(TopK, scale=2.5)), "do not sum to 1"),
    "copies beside a dense network": ("llama", Recipe(shared=dense), "count it twice.*experts=fresh"),
    "k = 1 with normalised weights": ("llama", Recipe(router=partial(TopK, k=1)), "router gets no gradient"),
    "more choices than experts": ("llama", Recipe(num_experts=2, router=partial(TopK, k=4)), "k=4 experts"),
    "looking ahead in a decoder": ("llama", Recipe(router=PER_GROUP), "is in a decoder.*allow_noncausal=True"),
    "looking ahead in GPT-2": ("gpt2", Recipe(router=PER_GROUP), "is in a decoder"),
    "looking ahead in OPT": ("opt", Recipe(router=PER_GROUP), "is in a decoder"),
    "looking ahead in the decoder of T5": ("t5", Recipe(router=PER_GROUP), r"decoder\.block\.0.* is in a decoder"),
    "looking ahead in the decoder of BART": ("bart", Recipe(router=PER_GROUP), "decoder.* is in a decoder"),
    "looking ahead in the decoder of Whisper": ("whisper", Recipe(router=PER_GROUP), "is in a decoder"),
    "parts that do not divide": ("llama", Recipe(num_experts=5, experts=splits), "cannot be split into 5"),
    "a pattern without a match": ("llama", Recipe(where=named("nothing like it")), "nothing matches"),
    "modules that are no network": ("llama", Recipe(where=modules("self_attn$")), "cannot be an expert"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_says_why_and_leaves_the_model_as_it_was(case):
    family, recipe, words = REFUSED[case]
    model = widened(DENSE[family]())
    given = inputs(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = {name: type(part) for name, part in model.named_modules()}
    before = output(model, given)
    with pytest.raises(ValueError, match=words):
        sparsify(model, recipe, verbose=False)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: type(part) for name, part in model.named_modules()} == kinds
    assert hooks(model) == 0
    assert Origin.of(model) == Origin()
    assert torch.equal(output(model, given), before)


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_a_router_may_look_ahead_in_an_encoder(family):
    assert len(sparse_layers(make(family, Recipe(num_experts=4, router=PER_GROUP)))) == 2


def test_a_router_may_look_ahead_in_the_encoder_of_an_encoder_decoder():
    model = make("t5", Recipe(num_experts=4, router=PER_GROUP, where=named("^encoder")))
    assert len(sparse_layers(model)) == 2


def test_a_router_may_look_ahead_in_a_decoder_if_told_so():
    assert len(sparse_layers(make("llama", Recipe(num_experts=4, router=PER_GROUP), allow_noncausal=True))) == 2


def test_weights_that_do_not_sum_to_one_may_be_compensated():
    model = widened(DENSE["llama"]())
    given = inputs(model)
    before = output(model, given)
    halves = partial(TopK, k=4, normalize=False, score=sigmoid, init_std=0.0)
    sparsify(model, Recipe(num_experts=4, router=halves, experts=partial(copies, scale=0.5)), verbose=False)
    torch.testing.assert_close(output(model, given), before, rtol=1e-4, atol=1e-4)


SHARED = {
    "dense": (dense, lambda network, x: network(x)),
    "frozen": (frozen, lambda network, x: network(x)),
    "gated": (gated, lambda network, x: 0.5 * network(x)),
}


@pytest.mark.parametrize("kind", SHARED)
def test_zero_experts_beside_a_shared_network_answer_as_it_does(kind):
    shared, formula = SHARED[kind]
    model = nn.Sequential(*blocks(2))
    network, x = copy.deepcopy(model[0].ffn), torch.randn(2, 5, 8)
    sparsify(model, Recipe(num_experts=4, experts=partial(fresh, zero=True), shared=shared), verbose=False)
    if kind == "gated":
        nn.init.zeros_(model[0].ffn.shared.gate.weight)
    torch.testing.assert_close(model[0].ffn(x), formula(network, x))
    trained = [parameter.requires_grad for parameter in model[0].ffn.shared.parameters()]
    assert not any(trained) if kind == "frozen" else all(trained)


def test_a_frozen_network_gets_no_gradient_and_passes_it_on():
    model = nn.Sequential(*blocks(1))
    sparsify(model, Recipe(num_experts=4, experts=fresh, shared=frozen), verbose=False)
    x = torch.randn(2, 5, 8, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.any()
    assert all(parameter.grad is None for parameter in model[0].ffn.shared.parameters())
    assert all(parameter.grad is not None for parameter in model[0].ffn.experts.parameters())


def mask(batch: int = 2, length: int = 12, left: bool = False):
    real = torch.ones(batch, length, dtype=torch.long)
    real[1, :5] = 0
    return real if left else real.flip(1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "t5", "bart", "bert"])
def test_only_real_tokens_are_routed(family):
    model = make(family)
    given = inputs(model) | {"attention_mask": mask()}
    with record(model) as decisions:
        model(**given)
    for name, routing in decisions.items():
        asked = 24 if "decoder" in name and family in ("t5", "bart") else 24 - 5  # a decoder was given no mask
        assert int(routing.counts.sum()) == 2 * asked, name


def test_the_decoder_has_a_mask_of_its_own():
    model = make("t5")
    given = inputs(model) | {"attention_mask": mask(), "decoder_attention_mask": torch.arange(12).lt(6).repeat(2, 1)}
    with record(model) as decisions:
        model(**given)
    asked = {name: int(routing.counts.sum()) // 2 for name, routing in decisions.items()}
    assert {n for name, n in asked.items() if "encoder" in name} == {24 - 5}
    assert {n for name, n in asked.items() if "decoder" in name} == {2 * 6}


def test_padding_changes_no_answer_of_a_real_token():
    model = make("bert")
    given = inputs(model)
    del given["labels"]
    alone = model(input_ids=given["input_ids"][1:, :7]).logits
    together = model(**given, attention_mask=mask()).logits
    torch.testing.assert_close(together[1:, :7], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "qwen3"])
def test_padding_on_the_left_changes_no_generated_token(family):
    model = make(family)
    ids = tokens()
    ids[1, :5] = 0
    alone = [model.generate(ids[:1], max_new_tokens=6, do_sample=False)[0, 12:]]
    alone.append(model.generate(ids[1:, 5:], max_new_tokens=6, do_sample=False)[0, 7:])
    together = model.generate(ids, attention_mask=mask(left=True), max_new_tokens=6, do_sample=False)[:, 12:]
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b[: len(a)])


def test_generation_with_copies_says_what_the_dense_model_says():
    ids = tokens()
    expected = widened(DENSE["llama"]()).generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(make("llama").generate(ids, max_new_tokens=8, do_sample=False), expected)


def test_a_copy_of_a_sparse_model_hears_its_own_inputs():
    model = make("llama")
    other = copy.deepcopy(model)
    given = {"input_ids": tokens()}
    with record(model) as ours, record(other) as theirs:
        model(**given, attention_mask=mask())
        other(**given)
        model(**given, attention_mask=mask())
    assert {int(routing.counts.sum()) for routing in ours.values()} == {2 * 19}
    assert {int(routing.counts.sum()) for routing in theirs.values()} == {2 * 24}
    torch.testing.assert_close(other(**given).logits, model(**given).logits)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_agrees():
    model = make("llama")
    given = {"input_ids": tokens(), "attention_mask": mask()}
    expected = model(**given).logits
    torch.testing.assert_close(torch.compile(model, backend="eager")(**given).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_gradient_checkpointing_gives_the_same_gradients(family):
    model = make(family)
    given = inputs(model) | {"attention_mask": mask()}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for part in model.modules():
                if isinstance(part, nn.Dropout):
                    part.p = 0.0
            model.train()
        model.zero_grad()
        model(**given).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda words, name=name: f"{name}: {words}")


def test_a_sparse_model_moves_and_changes_its_dtype():
    model = make("llama").to(torch.bfloat16)
    assert model(**inputs(model)).logits.dtype == torch.bfloat16
    assert model.to(torch.float64)(**inputs(model)).logits.dtype == torch.float64


def test_layers_know_their_names():
    assert all(layer.name == name for name, layer in sparse_layers(make("llama")).items())


def test_the_model_itself_is_returned():
    model = DENSE["llama"]()
    assert sparsify(model, COPIES, verbose=False) is model
    assert isinstance(model.model.layers[0].mlp, MoE)


@pytest.mark.data
def test_a_trained_model_survives_copying_and_is_kept_from_switch_weights(monkeypatch):
    from transformers import AutoModelForCausalLM

    try:
        folder = data_file("stories260k/hf/model.safetensors").parent
        data_file("stories260k/hf/config.json")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, model.config.vocab_size, (2, 64))
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(ValueError, match="do not sum to 1"):
            sparsify(model, Recipe(num_experts=4, router=SWITCH), verbose=False)
        with pytest.raises(ValueError, match=r"172 hidden units cannot be split into 8 equal experts.*: 2, 4"):
            sparsify(model, Recipe(num_experts=8, experts=splits), verbose=False)
        sparsify(model, COPIES, verbose=False)
        assert (model(ids).logits - before).abs().max() <= 2e-5
