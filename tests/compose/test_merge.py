"""Several models become the experts of one: what comes out exactly, what is refused, and how little is held at once."""

import copy
import gc
import weakref
from functools import partial

import pytest
import safetensors
import torch
from torch import nn
from transformers import LlamaForCausalLM

from branches import MODELS, branches, given, merge, same
from moeify import Recipe, load, record, save
from moeify.compose import expert_names, route_all_to, route_by_examples
from moeify.find import modules
from moeify.origin import Origin
from moeify.routers import Frozen, TopK
from moeify.sparsify import fresh, sparsify
from moeify.sparsify import merged as merged_experts
from moeify.store import load_weights
from plain_models import Tied, output, sparse_layers
from tiny_models import DENSE, VOCABULARY, causal_lm, inputs, tokens, widened


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_identical_models_make_one_that_computes_what_each_does(kind, k):
    model = widened(MODELS[kind]())
    merged = merge([model] * 3, Recipe(num_experts=3, router=partial(TopK, k=k)))
    assert all(layer.experts.num_experts == 3 for layer in sparse_layers(merged).values())
    x = given(model)
    assert same(output(merged, x), output(model, x))


@pytest.mark.parametrize("kind", MODELS)
def test_all_tokens_through_an_expert_and_the_rest_from_its_model_is_that_model(kind):
    models = branches(kind)
    x = given(models[0])
    for e, model in enumerate(models):
        merged = merge(models, base=model)
        with route_all_to(merged, e):
            assert same(output(merged, x), output(model, x))
        with route_all_to(merged, (e + 1) % 3):
            assert not same(output(merged, x), output(model, x))


def test_padding_goes_through_no_expert():
    models = branches("llama")
    merged = merge(models, base=models[1])
    mask = torch.ones(2, 12)
    mask[1, 8:] = 0
    with route_all_to(merged, 1), record(merged) as decisions:
        logits = merged(input_ids=tokens(), attention_mask=mask).logits
    assert {int(routing.counts[1]) for routing in decisions.values()} == {20}
    assert same(logits[1, :8], models[1](input_ids=tokens(), attention_mask=mask).logits[1, :8])


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_no_expert_is_the_mean_of_the_models_or_the_bases(kind):
    models = branches(kind)
    base = widened(MODELS[kind]())
    averaged, kept = merge(models).state_dict(), merge(models, base=base).state_dict()
    shared = base.state_dict().keys() & averaged.keys()
    assert shared
    for name in shared:
        mean = torch.stack([model.state_dict()[name].double() for model in models]).mean(0)
        assert torch.equal(averaged[name], mean.to(averaged[name].dtype)), name
        assert torch.equal(kept[name], base.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_of_equal_numbers_is_that_number_to_the_last_bit(dtype):
    model = widened(DENSE["llama"]()).to(dtype)
    merged = merge([model] * 7).state_dict()
    for name in model.state_dict().keys() & merged.keys():
        assert torch.equal(merged[name], model.state_dict()[name]), name


def test_the_models_stay_as_they_are():
    models = branches("llama")
    before = [copy.deepcopy(model.state_dict()) for model in models]
    with torch.no_grad():
        for parameter in merge(models).parameters():
            parameter.zero_()
    for model, state in zip(models, before, strict=True):
        assert not sparse_layers(model)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["gpt2", "t5", "plain"])
def test_tied_weights_stay_tied(kind):
    merged = merge(branches(kind))
    ends = (
        (merged.embedding, merged.head)
        if kind == "plain"
        else (merged.get_input_embeddings(), merged.get_output_embeddings())
    )
    assert ends[0].weight is ends[1].weight


def test_whole_modules_become_experts_too():
    models = branches("plain")
    merged = merge(models, Recipe(num_experts=3, where=modules("ffn$")), base=models[2])
    x = given(models[2])
    with route_all_to(merged, 2):
        assert same(output(merged, x), output(models[2], x))


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "vit"])
def test_checkpoints_merge_as_the_modules_do(kind, shards, tmp_path):
    models = branches(kind)
    for e, model in enumerate(models):
        model.save_pretrained(tmp_path / str(e), max_shard_size=shards)
    torch.manual_seed(0)
    expected = merge(models).state_dict()
    torch.manual_seed(0)
    merged = merge([tmp_path / str(e) for e in range(3)])
    assert type(merged) is type(models[0])
    for name, value in merged.state_dict().items():
        assert "router" in name or torch.equal(value, expected[name]), name


def test_a_file_of_a_plain_model_merges_into_one_of_its_kind(tmp_path):
    models = branches("plain with biases")
    for e, model in enumerate(models):
        safetensors.torch.save_file(model.state_dict(), tmp_path / f"{e}.safetensors")
    merged = merge([tmp_path / f"{e}.safetensors" for e in range(3)], base=models[0])
    x = (torch.randn(2, 5, 8),)
    with route_all_to(merged, 0):
        assert same(output(merged, x), output(models[0], x))


class Counting:
    """`safe_open`, counting the bytes of all tensors that it has handed out and that still live."""

    def __init__(self, real):
        self.real, self.alive, self.peak, self.read = real, 0, 0, 0

    def __call__(self, *args, **options):
        file = self.real(*args, **options)

        class File:
            def __enter__(self):
                self.opened = file.__enter__()
                return self

            def __exit__(self, *error):
                file.__exit__(*error)

            def __getattr__(self, name):
                return getattr(self.opened, name)

            get_tensor = lambda file, name: self.count(file.opened.get_tensor(name))  # noqa: E731

        return File()

    def count(self, tensor):
        size = tensor.numel() * tensor.element_size()
        self.alive, self.read = self.alive + size, self.read + size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(tensor, self.release, size)
        return tensor

    def release(self, size):
        self.alive -= size


@pytest.mark.parametrize("rest", ["base", "mean"])
def test_of_models_on_disk_one_tensor_at_a_time_is_in_memory(rest, tmp_path, monkeypatch):
    models = branches("llama", 4)
    for e, model in enumerate(models):
        model.save_pretrained(tmp_path / str(e), max_shard_size="20KB")
    counting = Counting(safetensors.safe_open)
    monkeypatch.setattr(safetensors, "safe_open", counting)
    gc.disable()  # tensors must go when they are no longer needed, not when somebody cleans up
    try:
        merge([tmp_path / str(e) for e in range(4)], base=tmp_path / "0" if rest == "base" else None)
    finally:
        gc.enable()
    sizes = [p.numel() * p.element_size() for p in models[0].parameters()]
    ffn = sum(p.numel() * p.element_size() for n, p in models[0].named_parameters() if "mlp" in n)
    assert counting.read == 4 * (ffn if rest == "base" else sum(sizes))
    assert 0 < counting.peak <= max(sizes)
    assert counting.alive == 0


@torch.no_grad()
def resized(model):
    model = copy.deepcopy(model)
    model.resize_token_embeddings(VOCABULARY + 4)
    return model


def untied():
    model = DENSE["gpt2"]()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    return model


LLAMA = DENSE["llama"]
UNLIKE = {
    "vocabularies of two sizes": (
        LLAMA, lambda: resized(LLAMA()),
        r"'b'.*embed_tokens.weight is \(260, 32\) there and \(256, 32\).*resize_token_embeddings\(256\)",
    ),
    "hidden layers of two widths": (
        LLAMA, lambda: causal_lm("llama", intermediate_size=96), r"gate_proj.weight is \(96, 32\).*one size",
    ),
    "fewer layers": (LLAMA, lambda: causal_lm("llama", num_hidden_layers=1), "no tensor model.layers.1.*architecture"),
    "more layers": (LLAMA, lambda: causal_lm("llama", num_hidden_layers=3), "a tensor model.layers.2.*have not"),
    "another architecture": (LLAMA, DENSE["gpt2"], "'b'.*no tensor model.embed_tokens.weight.*architecture"),
    "another activation": (LLAMA, lambda: causal_lm("llama", hidden_act="gelu"), "mlp.act_fn is GELU.* SiLU"),
    "other heads": (
        LLAMA, lambda: causal_lm("llama", num_attention_heads=2, num_key_value_heads=1, head_dim=16),
        "q_proj.weight|k_proj.weight|config.num_attention_heads",
    ),
    "another base of positions": (
        LLAMA, lambda: causal_lm("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "config.rope_parameters.rope_theta is 500000.*set it alike",
    ),
    "weights tied in one": (DENSE["gpt2"], untied, "wte.weight and lm_head.weight differ there and are tied"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNLIKE)
def test_models_that_differ_in_more_than_values_are_refused_by_name(case):
    one, other, words = UNLIKE[case]
    with pytest.raises(ValueError, match=words):
        merge({"a": one(), "b": other()})


def mistral(**settings):
    return causal_lm("mistral", **{"sliding_window": None} | settings)


@pytest.mark.parametrize("stored", [False, True])
def test_models_of_two_classes_that_compute_alike_are_merged(stored, tmp_path):
    models = {"llama": widened(LLAMA()), "mistral": widened(mistral())}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    given = {name: tmp_path / name for name in models} if stored else models
    merged = merge(given)
    assert type(merged) is type(models["llama"])
    for key in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"):
        mean = torch.stack([model.state_dict()[key] for model in models.values()]).mean(0)
        assert same(merged.state_dict()[key], mean)


def test_models_of_two_classes_that_compute_something_else_are_refused():
    with pytest.raises(ValueError, match=r"a MistralForCausalLM whose config.sliding_window is 8, and None"):
        merge({"a": LLAMA(), "b": mistral(sliding_window=8)})

    class Scaled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    scaled = Scaled(LLAMA().config)
    with pytest.raises(ValueError, match="a LlamaForCausalLM with its tensors computes something else; merge models"):
        merge({"a": LLAMA(), "b": scaled})


def test_checkpoints_that_differ_are_refused_before_anything_is_read(tmp_path):
    LLAMA().save_pretrained(tmp_path / "a")
    causal_lm("llama", hidden_act="gelu").save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match=r"'b'.*config.hidden_act is gelu there and silu"):
        merge({"a": tmp_path / "a", "b": tmp_path / "b"})
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*on this disk"):
        merge([tmp_path / "nowhere"])
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file model\.safetensors"):
        merge({"a": tmp_path / "a", "b": tmp_path / "b"}, base=LLAMA())


def test_tables_of_rotary_frequencies_in_old_checkpoints_are_left_out(tmp_path):
    models = branches("llama", 2)
    expected = merge(models).state_dict()
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        frequencies = model.model.rotary_emb.inv_freq
        old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": frequencies.clone() for i in (0, 1)}
        safetensors.torch.save_file(safetensors.torch.load_file(file) | old, file, metadata={"format": "pt"})
    found = merge([tmp_path / "a", tmp_path / "b"]).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items() if "router" not in key)


def test_what_makes_no_sense_is_refused_with_the_way_out():
    models = branches("llama", 2)
    with pytest.raises(ValueError, match=r"experts with fresh.*leave experts out"):
        merge(models, Recipe(experts=fresh))
    with pytest.raises(ValueError, match=r"do not sum to 1.*normalise"):
        merge(models, Recipe(num_experts=2, router=partial(TopK, normalize=False)))
    with pytest.raises(ValueError, match=r"8 experts of 2 models \(a, b\); give one name per expert"):
        sparsify(models[0], Recipe(experts=partial(merged_experts, names=["a", "b"])))
    with pytest.raises(ValueError, match=r"num_experts=8, but there are 2 models.*; set num_experts=2, or give more"):
        merge(models, Recipe(num_experts=8))
    with pytest.raises(ValueError, match="no model to merge"):
        merge([])
    with pytest.raises(ValueError, match=r"examples for \['a'\], and the models are \['0', '1'\]"):
        merge(models, router_init={"a": [tokens()]})
    with pytest.raises(ValueError, match="no example for the expert '1'"):
        merge(models, router_init={"0": [tokens()], "1": []})
    with pytest.raises(ValueError, match="look alike to the router of"):
        merge(models, router_init={"0": [tokens()], "1": [tokens()]}, base=models[0])
    with pytest.raises(ValueError, match="there is no expert 'x'; there are: 0, 1"), route_all_to(merge(models), "x"):
        pass
    with pytest.raises(ValueError, match="has no sparse layer"), route_all_to(models[0], 0):
        pass
    with pytest.raises(ValueError, match="no example for the expert '0'; give a list"):
        merge(models, router_init={"0": {"input_ids": tokens()}, "1": {"input_ids": tokens()}})
    with pytest.raises(ValueError, match="have no names"):
        expert_names(models[0])


def test_a_router_without_a_row_per_expert_takes_no_examples():
    models = branches("vit", 2)
    merged = merge(models, Recipe(num_experts=2, router=Frozen))
    with pytest.raises(ValueError, match="Frozen has no weight with a row per expert"):
        route_by_examples(merged, {str(e): [given(models[0])] for e in range(2)})


def test_names_are_kept_and_a_merged_model_comes_back_without_its_sources(tmp_path):
    models = branches("llama")
    merged = merge(dict(zip(("novels", "code", "math"), models, strict=True)))
    save(merged, tmp_path)
    loaded = load(tmp_path)
    assert expert_names(loaded) == ["novels", "code", "math"]
    assert Origin.of(loaded).recipe.to_dict() == Origin.of(merged).recipe.to_dict()
    assert torch.equal(output(loaded, inputs(merged)), output(merged, inputs(merged)))
    with route_all_to(loaded, "code"), route_all_to(merged, 1):
        assert torch.equal(output(loaded, inputs(merged)), output(merged, inputs(merged)))


def test_a_merged_plain_model_comes_back(tmp_path):
    merged = merge(branches("plain"))
    save(merged, tmp_path)
    loaded = load(tmp_path, model=Tied())
    assert torch.equal(output(loaded, given(Tied())), output(merged, given(Tied())))
    load_weights(merged, tmp_path)
