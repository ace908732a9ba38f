import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from adapter_folders import adapted_llama, answer, fill, layers, library, make_adapter, make_gates, same
from damage import damaged
from killing import forks, killed_at_every_operation
from moeify import from_adapters, load_adapters, save_adapters
from moeify.compose import add_adapter, load_gates, save_gates
from moeify.compose.peft_files import Adapter, LowRank, read_adapter, write_adapter
from moeify.files import write_json
from moeify.find import ffn
from moeify.routers import TopK
from moeify.sparsify import dense, lora_ffn
from strategies import seeds
from tiny_models import TINY


@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0.125, 9, width=32)), min_size=1, max_size=4), seeds)
def test_an_adapter_comes_back_from_its_files_exactly(tmp_path_factory, sizes, seed):
    torch.manual_seed(seed)
    maps = {
        f"layers.{i}.fc": LowRank(torch.randn(rank, 5), torch.randn(6, rank), scale)
        for i, (rank, scale) in enumerate(sizes)
    }
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(Adapter(maps), folder, targets=["fc"], transposed=False, base="")
    again = read_adapter(folder).modules
    assert again.keys() == maps.keys()
    for name, low in maps.items():
        assert torch.equal(again[name].A, low.A)
        assert torch.equal(again[name].B, low.B)
        assert torch.tensor(again[name].scale) == torch.tensor(low.scale)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "adapter of type IA3; only LORA"),
        ({"use_dora": True}, "DoRA rescales the weight"),
        ({"bias": "lora_only"}, "changes the base's biases"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole modules of the base"),
        ({"trainable_token_indices": [1]}, "changes embeddings"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"r": 3}, r"q_proj has rank 2 in adapter_model.safetensors and 3 in adapter_config.json"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused_in_words(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        library({"a": make_adapter(tmp_path / "a", **config)})


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (
            "base_model.model.model.embed_tokens.lora_embedding_A",
            (2, 256),
            "adapts an embedding, which is not a linear layer",
        ),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", (32,), "DoRA"),
        ("base_model.model.model.norm.weight", (32,), "not one of a LoRA beside a linear layer"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", (2, 32), r"up_proj has lora_A \(2, 32\)"),
    ],
)
def test_tensors_that_are_not_of_a_lora_are_named(key, shape, message, tmp_path):
    file = make_adapter(tmp_path / "a") / "adapter_model.safetensors"
    save_file(load_file(file) | {key: torch.zeros(shape)}, file)
    with pytest.raises(ValueError, match=message):
        library({"a": tmp_path / "a"})


def test_adapters_of_a_head_bring_the_weight_of_the_head_which_must_be_that_of_the_base(tmp_path):
    base = TINY["llama"]()
    file = make_adapter(tmp_path / "a", ["lm_head", "q_proj"]) / "adapter_model.safetensors"
    without = answer(from_adapters(TINY["llama"]().eval(), {"a": tmp_path / "a"}, verbose=False))
    head = base.lm_head.weight.detach()
    for weight in (head, head.bfloat16()):
        save_file(load_file(file) | {"base_model.model.lm_head.base_layer.weight": weight.contiguous()}, file)
        assert torch.equal(answer(library({"a": tmp_path / "a"}, TopK)), without)
    save_file(load_file(file) | {"base_model.model.lm_head.base_layer.weight": head + 1}, file)
    with pytest.raises(ValueError, match=r"for another base: the weight of lm_head that its file holds"):
        library({"a": tmp_path / "a"})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_of_the_head_as_peft_saves_it_is_read(family, tmp_path):
    peft = pytest.importorskip("peft")
    base = TINY[family]().eval()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["lm_head"])).eval()
    fill(theirs)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("base_layer" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    same(answer(from_adapters(base, {"a": tmp_path}, verbose=False)), answer(theirs))


def test_adapters_of_another_base_are_refused_by_their_tensors(tmp_path):
    folder = make_adapter(tmp_path / "a", ["q_proj"])
    wide = TINY["llama"]().config
    wide.hidden_size, wide.head_dim = 64, 16
    base = type(TINY["llama"]())(wide)
    with pytest.raises(
        ValueError, match=r"another base: model.layers.0.self_attn.q_proj.lora_A is \(2, 32\).*\(2, 64\)"
    ):
        from_adapters(base, {"a": folder})
    with pytest.raises(ValueError, match=r"q_proj, which this GPT2LMHeadModel does not have"):
        from_adapters(TINY["gpt2"](), {"a": folder})
    with pytest.raises(ValueError, match=r"\(here it is layers.0.self_attn.q_proj\)"):
        from_adapters(TINY["llama"]().model, {"a": folder})


def test_linear_layers_that_are_not_called_cannot_have_adapters(tmp_path):
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False)
    with pytest.raises(ValueError, match=r"self_attn.out_proj, a NonDynamically.* only linear layers that are called"):
        from_adapters(base, {"a": make_adapter(tmp_path / "a", ["out_proj"], base=base)})
    x = torch.randn(2, 5, 16)
    before = base.eval()(x)
    from_adapters(base, {"b": make_adapter(tmp_path / "b", ["linear1"], base=base)}, verbose=False)
    assert (base(x) - before).abs().max() > 0.01


def test_missing_and_unsafe_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the folder of a PEFT adapter"):
        library({"a": tmp_path})
    folder = make_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle, which may run code"):
        library({"a": folder})
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="nothing of the adapter 'a' attaches"):
        library({"a": folder})
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        library({"a": folder})
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a mapping"):
        library({"a": folder})


def test_names_that_cannot_be_folders_or_are_taken_are_refused(folders):
    with pytest.raises(ValueError, match=r"cannot be called '../law'"):
        library({"../law": folders["law"]})
    with pytest.raises(ValueError, match="has an adapter 'law' already"):
        add_adapter(library(folders), "law", folders["law"])
    with pytest.raises(ValueError, match="sparse already"):
        from_adapters(library(folders), folders)
    with pytest.raises(ValueError, match="there is no adapter to attach"):
        library({})
    with pytest.raises(ValueError, match="has no adapters; attach some"):
        add_adapter(TINY["llama"](), "law", folders["law"])


def test_a_gate_of_another_width_is_refused(folders):
    save_gates({"model.layers.0.self_attn.q_proj": torch.ones(3)}, folders["law"])
    with pytest.raises(ValueError, match=r"the gate of model.layers.0.self_attn.q_proj of the adapter 'law' is \(3,\)"):
        library(folders)


def test_libraries_that_do_not_fit_are_refused_before_the_base_changes(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not written by moeify\.save_adapters"):
        load_adapters(TINY["llama"](), tmp_path / "law")
    save_adapters(library(folders), tmp_path / "library")
    base, routers = TINY["llama"](), load_file(tmp_path / "library/router.safetensors")
    parts = list(dict(base.named_modules()))
    (tmp_path / "library/SHA256.json").unlink()
    name = "model.layers.1.self_attn.v_proj.weight"  # the last: nothing may have been assigned before
    for change in ({}, {name: torch.zeros(3, 31)}, {name: torch.zeros(3, 32, dtype=torch.int32)}):
        save_file({k: t for k, t in routers.items() if k != name} | change, tmp_path / "library/router.safetensors")
        with pytest.raises(ValueError, match=rf"router.safetensors is not of this library; missing, .* dtype: {name}"):
            load_adapters(base, tmp_path / "library")
        assert list(dict(base.named_modules())) == parts
    description = json.loads((tmp_path / "library/moeify.json").read_text())
    for content, message in (
        (description | {"adapters": ["../law"]}, "cannot be called"),
        (description | {"adapters": None}, "is damaged, or not written by"),
        (description | {"dropout": "much"}, "could not convert"),
        ({}, "is damaged, or not written by"),
    ):
        write_json(tmp_path / "library/moeify.json", content)
        with pytest.raises(ValueError, match=message):
            load_adapters(base, tmp_path / "library")


def small(folder, seed: int, hashed: bool = True):
    """A small library, saved."""
    made = {
        name: make_gates(make_adapter(folder / "from" / name, ["q_proj"], seed=seed + i), seed=seed)
        for i, name in enumerate(("law", "med"))
    }
    save_adapters(library(made), folder / "library")
    if not hashed:
        for path in (folder / "library").rglob("SHA256.json"):
            path.unlink()
    return folder / "library"


@pytest.mark.parametrize("hashed", [True, False])
def test_damage_to_any_file_of_a_library_is_refused_and_leaves_the_base(hashed, tmp_path):
    folder, other = small(tmp_path / "one", 1, hashed), small(tmp_path / "two", 5, hashed)
    expected, base = answer(load_adapters(TINY["llama"]().eval(), folder)), TINY["llama"]().eval()
    for name, what in damaged(folder, other):
        try:
            load_adapters(base, folder)
        except (ValueError, OSError) as error:
            assert str(folder) in str(error), (name, what)  # noqa: PT017 (it may also load)
            assert not layers(base)
        else:
            assert not hashed or (what, name.rpartition("/")[2]) == ("deleted", "SHA256.json"), (name, what)
            assert not hashed or torch.equal(answer(base), expected)
            base = TINY["llama"]().eval()


def test_damage_to_gates_is_refused_and_files_of_peft_beside_them_need_no_hashes(tmp_path):
    folder, other = (make_gates(make_adapter(tmp_path / str(seed), seed=seed), seed) for seed in (1, 2))
    expected = load_gates(folder)
    assert json.loads((folder / "SHA256.json").read_text())["files"].keys() == {"gates.safetensors"}
    for name, what in damaged(folder, other, skip=("adapter_config.json", "adapter_model.safetensors")):
        try:
            read = load_gates(folder)
        except (ValueError, OSError) as error:
            assert str(folder) in str(error), (name, what)  # noqa: PT017 (it may also be read)
        else:
            assert (what, name) == ("deleted", "SHA256.json")
            assert all(torch.equal(read[key], gate) for key, gate in expected.items())
    save_gates({"a": torch.ones(3, dtype=torch.int32)}, tmp_path / "integers")
    with pytest.raises(ValueError, match=r"int32 \(3,\) for a; a gate is a vector of weights"):
        load_gates(tmp_path / "integers")


@forks
def test_a_kill_while_a_library_is_replaced_leaves_the_old_one_or_the_new_one(tmp_path):
    old, new = small(tmp_path / "old", 1), small(tmp_path / "new", 5)
    one, two = (load_adapters(TINY["llama"]().eval(), folder) for folder in (old, new))
    seen = []
    for folder, done in killed_at_every_operation(lambda folder: save_adapters(two, folder), old, tmp_path, step=25):
        found = answer(load_adapters(TINY["llama"]().eval(), folder))
        seen.append(torch.equal(found, answer(two)))
        assert seen[-1] or (torch.equal(found, answer(one)) and not done)
    assert not seen[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank_pattern": {r"(\w|\w\w|\w{3}|\.)+(\w|\w\w|\.)+[!?]": 2}}, "takes longer than .* without repetitions"),
        ({"alpha_pattern": {"(": 2}}, r"'\^.*' is not a regular expression"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern=.*not a mapping from patterns to numbers"),
        ({"alpha_pattern": {"q_proj": "2"}}, "q_proj='2', which must be a number"),
        ({"lora_alpha": None}, "lora_alpha=None, which must be a number"),
        ({"r": float("nan")}, "r=nan, which must be a number"),
    ],
)
def test_settings_that_no_scale_follows_from_are_refused(config, message, tmp_path, monkeypatch):
    monkeypatch.setattr("moeify.patterns.LONGEST", 0.05)
    folder = make_adapter(tmp_path / "a", ["q_proj"], **config)
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.int32])
def test_tensors_that_are_no_weights_are_refused(dtype, tmp_path):
    file = make_adapter(tmp_path / "a", ["q_proj"]) / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors has .*q_proj.* in torch.*, which are not weights"):
        read_adapter(tmp_path / "a")


def test_what_no_adapter_of_peft_can_be_is_not_written_as_one(tmp_path):
    with pytest.raises(ValueError, match="q_proj is trained with its adapters"):
        save_adapters(adapted_llama(shared=dense), tmp_path)
    with pytest.raises(ValueError, match="has LoRAFFN experts; merge_into_experts"):
        save_adapters(adapted_llama(where=ffn, experts=lora_ffn, shared=lambda dense, width: None), tmp_path)
    with pytest.raises(ValueError, match="is not a linear layer with adapters beside it"):
        save_adapters(adapted_llama(where=ffn), tmp_path)
