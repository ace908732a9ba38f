"""Sparse models on disk: what is saved comes back, and what is damaged is refused by name and changes nothing."""

import copy
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moeify.find import every
from moeify.origin import Origin
from moeify.routers import TopK, sigmoid
from moeify.sparsify import Recipe, copies, dense, fresh, gated, recipes, sparsify, splits
from moeify.store import load, load_weights, save
from nights import layouts, nightly
from plain_models import Tied, output, sparse_layers
from tiny_models import DENSE, inputs, widened

COPIES = Recipe(num_experts=4)
BIASED = Recipe(num_experts=4, router=partial(TopK, score=sigmoid, selection_bias=True))


def sparse(family: str = "llama", recipe: Recipe = COPIES) -> nn.Module:
    """A sparse model whose experts have gone their own ways."""
    model = sparsify(DENSE[family](), recipe, verbose=False, allow_noncausal=True)
    return widened(model).eval()


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("family", DENSE)
def test_a_loaded_model_is_the_saved_one(family, tmp_path):
    model = sparse(family)
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_equal(loaded, model)
    assert torch.equal(output(loaded, inputs(model)), output(model, inputs(model)))


@pytest.mark.parametrize(
    "recipe",
    [
        *(nightly(recipe) if name in layouts() else recipe for name, recipe in recipes.items()),
        Recipe(num_experts=4, experts=partial(copies, noise=0.1, drop=0.5)),
        Recipe(num_experts=4, experts=splits, where=every(2)),
        Recipe(num_experts=4, experts=fresh, shared=gated),
        Recipe(num_experts=4, experts=partial(fresh, zero=True), shared=dense),
    ],
)
def test_every_recipe_comes_back(recipe, tmp_path):
    model = sparse(recipe=recipe)
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert_equal(loaded, model)
    assert Origin.of(loaded).recipe.to_dict() == recipe.to_dict()


def test_weights_spread_over_files_come_back(tmp_path):
    model = sparse()
    save(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_equal(load(tmp_path), model)


def test_saving_again_leaves_nothing_of_the_last_time(tmp_path):
    save(sparse(), tmp_path, max_shard_size="20KB")
    model = sparse("gpt2")
    save(model, tmp_path)
    described = ["README.md", "SHA256.json", "config.json", "generation_config.json"]
    files = [*described, "model.safetensors", "modeling_moeify.py"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert_equal(load(tmp_path), model)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_tied_weights_are_saved_once_and_tied_again(family, tmp_path):
    model = sparse(family)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert sum(value.numel() for value in load_file(tmp_path / "model.safetensors").values()) == sum(
        parameter.numel() for parameter in model.parameters()
    )


def test_a_plain_model_is_loaded_into_one_of_its_kind(tmp_path):
    model = widened(sparsify(Tied(), COPIES, verbose=False))
    save(model, tmp_path)
    with pytest.raises(ValueError, match=r"holds a plain_models\.Tied.*load\(folder, model=\.\.\.\)"):
        load(tmp_path)
    loaded = load(tmp_path, model=Tied())
    assert_equal(loaded, model)
    assert loaded.head.weight is loaded.embedding.weight


def test_a_model_that_does_not_fit_is_as_it_was_before(tmp_path):
    save(sparsify(Tied(), COPIES, verbose=False), tmp_path)
    other = Tied()
    other.head = nn.Linear(3, 5)  # found out when the sparse layers stand in their places already
    before, parts = copy.deepcopy(other), list(other.modules())
    with pytest.raises(ValueError, match=r"missing: head\.bias"):
        load(tmp_path, model=other)
    assert list(other.modules()) == parts
    assert_equal(other, before)


def test_a_recipe_of_ones_own_is_refused_before_anything_is_written(tmp_path):
    recipe = Recipe(num_experts=4, router=lambda width, num_experts: TopK(width, num_experts))
    model = sparse(recipe=recipe)
    with pytest.raises(ValueError, match="has no name, so a file cannot refer to it"):
        save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_dense_model_is_not_saved_as_a_sparse_one(tmp_path):
    with pytest.raises(ValueError, match=r"this LlamaForCausalLM was not made by moeify\.sparsify"):
        save(DENSE["llama"](), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_may_be_loaded_with_a_recipe_given_in_code(tmp_path):
    model = sparse(recipe=BIASED)
    save(model, tmp_path)
    assert_equal(load(tmp_path, recipe=Recipe(num_experts=4, router=lambda *sizes: BIASED.router(*sizes))), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_comes_back_in_its_dtype_and_its_bias_in_full(dtype, tmp_path):
    model = sparse(recipe=BIASED)
    for layer in sparse_layers(model).values():
        layer.router.selection_bias.copy_(torch.tensor([0.001, 1.0001, -1.0, 0.3]))
    model.to(dtype)
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert_equal(loaded, model)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert {layer.router.selection_bias.dtype for layer in sparse_layers(loaded).values()} == {torch.float32}


def test_loading_draws_on_no_chance(tmp_path):
    model = sparse()
    save(model, tmp_path)
    loaded = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        loaded.append(load(tmp_path))
    assert_equal(*loaded)


def test_a_loaded_model_trains(tmp_path):
    save(sparse(), tmp_path)
    model = load(tmp_path).train()
    model(**inputs(model)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_copy_of_a_model_is_saved_like_it(tmp_path):
    model = sparse()
    save(copy.deepcopy(model), tmp_path)
    assert_equal(load(tmp_path), model)


def broken(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    (folder / "SHA256.json").unlink()


ROUTER, LAST = "model.layers.0.mlp.router.weight", "model.norm.weight"
FAULTS = {
    "missing": (lambda w: w.pop(ROUTER), f"missing: {ROUTER}"),
    "many missing": (lambda w: [w.pop(name) for name in list(w)[:8]], "and 3 more"),
    "unexpected": (lambda w: w.update(extra=torch.ones(1)), "unexpected: extra"),
    "of another shape": (
        lambda w: w.update({ROUTER: torch.ones(5, 32)}),
        r"wrong shape: .*\(5, 32\).* needs \(4, 32\)",
    ),
    **{
        f"of {dtype}": (
            lambda w, dtype=dtype: w.update({LAST: w[LAST].to(dtype)}),
            rf"wrong dtype: {LAST} is {dtype}, the model needs torch.float32",
        )
        for dtype in (torch.int32, torch.complex64, torch.float8_e4m3fn)
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_assigned(fault, tmp_path):
    change, words = FAULTS[fault]
    save(sparse(), tmp_path)
    broken(tmp_path, change)
    model = sparsify(DENSE["llama"](), COPIES, verbose=False)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=f"are not those of this LlamaForCausalLM; .*{words}"):
        load_weights(model, tmp_path)
    assert_equal(model, before)
    with pytest.raises(ValueError, match=words):
        load(tmp_path)


def test_the_weights_of_another_model_are_refused(tmp_path):
    save(sparse(), tmp_path)
    with pytest.raises(ValueError, match=r"missing: .*; unexpected: "):
        load_weights(sparse("gpt2"), tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    save(sparse(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../evil.safetensors", "/tmp/evil.safetensors", "sub/evil.safetensors"])
def test_an_index_reaches_no_file_outside(name, tmp_path):
    folder = tmp_path / "checkpoint"
    model = sparse()
    save(model, folder)
    (folder / "sub").mkdir()
    (folder / "model.safetensors").rename(folder / name if not name.startswith("/") else folder / "moved")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {ROUTER: name}}))
    with pytest.raises(ValueError, match="it is not what was saved"):  # an index that the hashes do not list
        load(folder)
    (folder / "SHA256.json").unlink()
    with pytest.raises(ValueError, match="is outside the checkpoint folder"):
        load(folder)


@pytest.mark.parametrize("index", ["[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"])
def test_an_index_that_is_none_is_refused(index, tmp_path):
    save(sparse(), tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / "SHA256.json").unlink()
    with pytest.raises(ValueError, match=r"index\.json (must hold a mapping|has no 'weight_map')"):
        load(tmp_path)


CONFIGS = {
    "not JSON": ("{", "is not valid JSON"),
    "not text": (b"\xff\xfe\x00", "is not valid JSON"),
    "a list": ("[]", "must hold a mapping, not a list"),
    "of something else": ('{"model_type": "llama"}', "has no 'moeify'.*was not written by moeify"),
    "of an unknown model": (
        '{"moeify": "0", "recipe": {}, "model": {"class": "transformers.AutoTokenizer", "config": {}}}',
        "not a model of transformers",
    ),
    "of a model without a name": ('{"moeify": "0", "recipe": {}, "model": {}}', "not a model of transformers"),
    "of an unknown recipe": (
        '{"moeify": "0", "recipe": {"router": "tipk"}, "model": {"class": "transformers.ViTModel", "config": {}}}',
        "did you mean 'topk'",
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_description_that_is_none_is_refused(kind, tmp_path):
    content, words = CONFIGS[kind]
    save(sparse(), tmp_path)
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "SHA256.json").unlink()
    with pytest.raises(ValueError, match=words):
        load(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(file, tmp_path):
    save(sparse(), tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        load(tmp_path)


def test_files_may_be_links_as_they_are_in_the_cache_of_a_hub(tmp_path):
    model = sparse()
    save(model, tmp_path / "blobs", max_shard_size="20KB")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert_equal(load(tmp_path / "snapshot"), model)


def test_nothing_is_unpickled(tmp_path):
    save(sparse(), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"no file model\.safetensors"):
        load(tmp_path)


def test_a_pickle_beside_is_ignored(tmp_path):
    model = sparse()
    save(model, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert_equal(load(tmp_path), model)
