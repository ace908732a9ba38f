"""Loading runs nothing and makes nothing twice; ties are those that were saved; damage is found before it is read."""

import copy
import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from moeify import Recipe, load, register, save
from moeify.compose import from_adapters, merge_into_base
from moeify.compress import quantize_experts
from moeify.files import open_tensors, write_json
from moeify.find import modules
from moeify.registry import names
from moeify.routers import TopK
from moeify.sparsify import fresh, sparsify, splits
from moeify.sparsify.split import clustered
from moeify.store import load_weights, verify
from moeify.store.config import unfold
from nights import nightly
from plain_models import Gated, Recommender, Tied, blocks, encoder, output
from tiny_models import DENSE, causal_lm, inputs, widened

COPIES = Recipe(num_experts=4)


def sparse(family: str = "llama", recipe: Recipe = COPIES) -> nn.Module:
    return widened(sparsify(DENSE[family](), recipe, verbose=False)).eval()


def older(folder) -> None:
    """Take from a folder what earlier versions did not write."""
    description = unfold(json.loads((folder / "config.json").read_text()))
    for key in ("sites", "ties", "buffers", "sparse_layers"):
        description.pop(key, None)
    (folder / "SHA256.json").unlink()
    write_json(folder / "config.json", description)


class Allocated(TorchDispatchMode):
    """Counts the bytes of results in new memory; views, changes in place and what lies in a file are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type == "cpu" and "set_" not in str(function):
            given = {part.untyped_storage().data_ptr() for part in args if isinstance(part, torch.Tensor)}
            new = result.nbytes if result.untyped_storage().data_ptr() not in given else 0
            self.total += new
            self.largest = max(self.largest, new)
        return result


@pytest.mark.parametrize("family", DENSE)
def test_loading_runs_no_module(family, tmp_path):
    save(sparse(family), tmp_path)
    called = []
    handle = register_module_forward_pre_hook(lambda module, args: called.append(type(module).__name__))
    try:
        load(tmp_path)
    finally:
        handle.remove()
    assert called == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "vit", "bert", "whisper", "clip"])
def test_loading_allocates_what_the_files_hold_and_no_dense_copy(family, tmp_path):
    save(sparse(family), tmp_path)
    stored = load_file(tmp_path / "model.safetensors").values()
    load(tmp_path)  # what a first call prepares is not counted
    with Allocated() as allocated:
        load(tmp_path)
    assert allocated.largest <= max(4096, *(tensor.nbytes for tensor in stored))
    assert allocated.total <= 1.5 * sum(tensor.nbytes for tensor in stored)


def test_each_file_of_weights_is_opened_once_and_closed_whether_it_loads_or_not(tmp_path, monkeypatch):
    opened = {}

    def counted(file):
        assert file not in opened
        opened[file] = open_tensors(file)
        return opened[file]

    monkeypatch.setattr("moeify.store.reading.open_tensors", counted)
    save(sparse(), tmp_path, max_shard_size="20KB")
    load(tmp_path)
    assert len(opened) == len(list(tmp_path.glob("*.safetensors"))) > 1
    files = list(opened.values())
    opened.clear()
    with pytest.raises(ValueError, match="are not those of this"):
        load_weights(sparse("gpt2"), tmp_path)
    for file in (*files, *opened.values()):
        with pytest.raises(SafetensorError, match="closed"):
            file.keys()


@pytest.mark.parametrize("dtype", [nightly(torch.float32), torch.bfloat16])  # test_store compares outputs in fp32
@pytest.mark.parametrize("family", DENSE)
def test_buffers_that_no_file_holds_are_computed_as_they_were(family, dtype, tmp_path):
    model = sparse(family).to(dtype)
    save(model, tmp_path)
    loaded = load(tmp_path)
    theirs = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        assert buffer.dtype == theirs[name].dtype, name
        assert torch.equal(buffer, theirs[name]), name
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(model).items()}
    assert torch.equal(output(loaded, given), output(model, given))


def test_a_router_of_buffers_that_no_file_holds_comes_back(tmp_path):
    def gridded(width, num_experts):
        router = TopK(width, num_experts)
        router.register_buffer("grid", torch.linspace(0, 1, 5), persistent=False)
        return router

    if "test-gridded" not in names("router"):
        register("router", "test-gridded")(gridded)
    model = sparse(recipe=Recipe.from_dict({"num_experts": 4, "router": "test-gridded"}))
    save(model, tmp_path)
    assert torch.equal(load(tmp_path).model.layers[0].mlp.router.grid, torch.linspace(0, 1, 5))


PLAIN = {
    "gated": (lambda: nn.Sequential(*blocks(2)), (torch.randn(2, 5, 8),), COPIES),
    "tied": (Tied, (torch.randint(20, (2, 5)),), COPIES),
    "encoder": (encoder, (torch.randn(2, 5, 16),), COPIES),
    "recommender": (
        Recommender,
        (torch.arange(4), torch.arange(4)),
        Recipe(num_experts=4),
    ),
    "whole modules": (
        lambda: nn.Sequential(*blocks(2)),
        (torch.randn(2, 5, 8),),
        Recipe(num_experts=4, where=modules("ffn$")),
    ),
    "clustered": (
        lambda: nn.Sequential(*blocks(2)),
        (torch.randn(2, 5, 8),),
        Recipe.from_dict({"num_experts": 4, "experts": {"name": "splits", "split": "clustered"}}),
    ),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_model_computes_what_it_did(kind, old, tmp_path):
    build, given, recipe = PLAIN[kind]
    model = widened(sparsify(build(), recipe, verbose=False)).eval()
    save(model, tmp_path)
    if old:
        older(tmp_path)
    loaded = load(tmp_path, model=build())
    assert torch.equal(output(loaded, given), output(model, given))
    assert not any(parameter.is_meta for parameter in loaded.parameters())


@pytest.mark.parametrize("number", [torch.Tensor.item, torch.Tensor.numpy], ids=["item", "numpy"])
def test_a_part_that_computes_with_values_is_given_some(number, tmp_path):
    def scaled(dense, num_experts):
        experts = fresh(dense, num_experts)
        assert number(experts.up[0].detach().abs().max()) >= 0
        return experts

    name = f"test-scaled-{number.__name__}"
    if name not in names("experts"):
        register("experts", name)(scaled)
    model = sparse(recipe=Recipe.from_dict({"num_experts": 4, "experts": name}))
    save(model, tmp_path)
    assert torch.equal(output(load(tmp_path), inputs(model)), output(model, inputs(model)))


@pytest.mark.parametrize("family", DENSE)
def test_folders_of_earlier_versions_load(family, tmp_path):
    model = sparse(family)
    save(model, tmp_path)
    older(tmp_path)
    assert torch.equal(output(load(tmp_path), inputs(model)), output(model, inputs(model)))


def test_the_config_says_what_a_site_was_read_as(tmp_path):
    save(sparse("llama"), tmp_path)
    site = json.loads((tmp_path / "config.json").read_text())["sites"][0]
    assert site["name"] == "model.layers.0.mlp"
    assert site["up"] == ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    assert site["down"] == "model.layers.0.mlp.down_proj"
    assert site["gated"] is True
    assert site["width"] == 32


@pytest.mark.parametrize(
    "change",
    [
        lambda site: site.update(name="model.layers.7.mlp"),
        lambda site: site.pop("width"),
        lambda site: site.update(activation={"module": "model", "attribute": "forward"}),
        lambda site: site.update(disabled=[["", "eval", None]]),
        lambda site: site.update(up="mlp"),
    ],
)
def test_a_damaged_description_of_a_site_is_refused(change, tmp_path):
    save(sparse(), tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    change(description["sites"][0])
    write_json(tmp_path / "config.json", description)
    (tmp_path / "SHA256.json").unlink()
    with pytest.raises(ValueError, match="no modules for the site"):
        load(tmp_path)


def test_what_the_config_ties_and_the_model_does_not_stays_apart(tmp_path):
    model = causal_lm("llama", tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    sparsify(model, COPIES, verbose=False)
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(output(loaded, inputs(model)), output(model, inputs(model)))
    assert loaded.lm_head.weight is not loaded.get_input_embeddings().weight
    with pytest.raises(ValueError, match=r"are tied in this LlamaForCausalLM and differ"):
        load_weights(sparsify(causal_lm("llama", tie_word_embeddings=True), COPIES, verbose=False), tmp_path)


def test_an_adapter_of_the_head_merged_into_a_tied_model_is_kept(tmp_path):
    from moeify.compose.peft_files import Adapter, LowRank, write_adapter

    model = causal_lm("llama", tie_word_embeddings=True)
    vocabulary = model.config.vocab_size
    adapter = Adapter({"lm_head": LowRank(torch.randn(4, 32), torch.randn(vocabulary, 4), 1.0)})
    write_adapter(adapter, tmp_path / "law", targets=["lm_head"], transposed=False, base="")
    from_adapters(model, {"law": tmp_path / "law"}, verbose=False)
    merge_into_base(model, {"law": 1.0})
    sparsify(model, COPIES, verbose=False)
    save(model.eval(), tmp_path / "model")
    assert torch.equal(output(load(tmp_path / "model"), inputs(model)), output(model, inputs(model)))


def test_what_the_model_ties_and_the_config_does_not_is_tied_again(tmp_path):
    model = sparse()
    assert not model.config.tie_word_embeddings
    model.lm_head.weight = model.get_input_embeddings().weight
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert loaded.model.layers[1].self_attn.q_proj.weight is loaded.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(output(loaded, inputs(model)), output(model, inputs(model)))
    again = copy.deepcopy(model)
    nn.init.zeros_(again.lm_head.weight)
    load_weights(again, tmp_path)
    assert torch.equal(output(again, inputs(model)), output(model, inputs(model)))


def test_tensors_that_overlap_in_part_are_saved_whole(tmp_path):
    model = nn.Sequential(*blocks(2))
    sparsify(model, COPIES, verbose=False)
    both = torch.randn(2, 8)
    model.register_parameter("first", nn.Parameter(both))
    model.register_buffer("row", model.first.detach()[0])
    save(model, tmp_path)
    dense = nn.Sequential(*blocks(2))
    dense.register_parameter("first", nn.Parameter(torch.zeros(2, 8)))
    dense.register_buffer("row", torch.zeros(8))
    loaded = load(tmp_path, model=dense)
    assert torch.equal(loaded.first, both)
    assert torch.equal(loaded.row, both[0])


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model = sparse("t5")
    for name, each in (("one", model), ("two", copy.deepcopy(model))):
        save(each, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_a_folder_without_hashes_loads_and_cannot_be_verified(tmp_path):
    save(sparse(), tmp_path)
    (tmp_path / "SHA256.json").unlink()
    load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no SHA256\.json.*cannot be verified"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["recipe"].update(num_experts=10**9), "says num_experts=1000000000"),
        (lambda d: d.update(hidden_size=2**40), "says hidden_size="),
        (lambda d: d.update(num_hidden_layers=10**9), "says num_hidden_layers="),
        (lambda d: d.update(num_hidden_layers=1e9), "says num_hidden_layers="),
        (lambda d: d.update(num_labels=10**12), "says num_labels="),
        (lambda d: d.update(num_hidden_layers=9_999), "describes more than 10000 parts"),
        (lambda d: d.update(num_hidden_layers=3), "missing: "),
        (lambda d: d.update(vocab_size=10**6), "wrong shape: "),
        (lambda d: d["recipe"].update(num_experts=5), "wrong shape: "),
        (lambda d: d.update(hidden_act="wilu"), r"no LlamaForCausalLM can be built .*wilu"),
        (lambda d: d.update(hidden_size="wide"), "no LlamaForCausalLM can be built"),
        (lambda d: d.update(ties={"lm_head.weight": "nothing"}), "missing|nothing"),
        (lambda d: d.update(ties=[]), "has no 'ties'"),
        (lambda d: d.update(ties={"lm_head.weight": 3}), "'ties' do not name tensors"),
        (lambda d: d.update(buffers={"nowhere": "float16"}), "says that the buffer nowhere is 'float16'"),
        (lambda d: d.update(buffers={"model.rotary_emb.inv_freq": "save"}), "inv_freq is 'save'"),
        (lambda d: d.update(quantization=[{"module": []}]), "there is no module to quantise"),
        (lambda d: d.update(sites=[3]), "no modules for the site"),
        (lambda d: d["recipe"].update(router={"name": ["topk"]}), "router must be a name or a mapping"),
        (lambda d: d["recipe"].update(router={"name": "topk", "k": 2.0}), "needs a whole number as k, and not 2.0"),
    ],
)
def test_what_a_config_promises_is_compared_before_anything_is_allocated(change, words, tmp_path):
    save(sparse(), tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    change(description)
    write_json(tmp_path / "config.json", description)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load(tmp_path)
    (tmp_path / "SHA256.json").unlink()
    with Allocated() as allocated, pytest.raises(ValueError, match=words):
        load(tmp_path)
    assert allocated.largest < 2**20


def test_a_loaded_model_generates_as_the_saved_one_was_told_to(tmp_path):
    model = sparse()
    model.generation_config.update(eos_token_id=[2, 5], max_new_tokens=7, do_sample=True, temperature=0.5)
    save(model, tmp_path)
    assert load(tmp_path).generation_config == model.generation_config
    file = tmp_path / "generation_config.json"
    file.write_text(file.read_text().replace("0.5", "0.6"))
    with pytest.raises(ValueError, match=r"generation_config\.json is damaged"):
        load(tmp_path)


def test_loading_draws_no_random_number(tmp_path):
    save(sparse(), tmp_path)
    before = torch.random.get_rng_state()
    load(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_loaded_model_does_not_lie_in_the_files(tmp_path):
    model = sparse()
    save(model, tmp_path)
    loaded = load(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(output(loaded, inputs(model)), output(model, inputs(model)))


def test_a_gate_in_an_unusual_order_is_not_guessed(tmp_path):
    model = widened(sparsify(nn.Sequential(*blocks(1)), Recipe(num_experts=2, experts=splits), verbose=False))
    save(model, tmp_path)
    site = json.loads((tmp_path / "config.json").read_text())["sites"][0]
    assert [name.rpartition(".")[2] for name in site["up"]] == ["beta", "alpha"]
    assert isinstance(nn.Sequential(*blocks(1))[0].ffn, Gated)
    assert callable(clustered)


def test_a_folder_of_adapters_alone_is_refused_with_the_way_to_open_it(tmp_path):
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(FileNotFoundError, match=r"holds adapters of PEFT .* PeftModel.from_pretrained"):
        load(tmp_path)


def test_what_takes_long_says_how_much_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("moeify.progress.EVERY", 0.0)
    model = sparsify(causal_lm("llama"), Recipe(num_experts=2), verbose=False)
    assert "making experts: 1 of 2, about" in capsys.readouterr().out
    save(model, tmp_path, max_shard_size="20KB")
    assert "writing weights: 1 of" in capsys.readouterr().out
    quantize_experts(load(tmp_path))
    shown = capsys.readouterr().out
    for line in ("verifying weights: 1 of", "reading weights: 1 of", "quantising experts: 1 of 2, about"):
        assert line in shown
