import copy
import json
from functools import partial

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from adapter_folders import (
    ATTENTION,
    adapted_llama,
    answer,
    fill,
    layers,
    library,
    make_adapter,
    make_gates,
    same,
    state,
)
from moeify import Recipe, from_adapters, load_adapters, record, save, save_adapters, sparsify
from moeify.compose import adapters_of, add_adapter, merge_into_base, show_adapters
from moeify.compose.peft_files import read_adapter
from moeify.compress.quantize import quantize_module
from moeify.experts import LoRA
from moeify.find import linears
from moeify.routers import Arrow, ExpertChoice, Phatgoose, TopK, Uniform
from moeify.routers.shared_routing import shared_routing
from moeify.sparsify import frozen, lora
from tiny_models import TINY

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"], "vit": "all-linear", "t5": ["q", "v", "wo"]}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", TARGETS)
def test_one_adapter_alone_computes_what_peft_computes(family, rslora, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[family], use_rslora=rslora)
    theirs = peft.get_peft_model(TINY[family](), config).eval()
    fill(theirs)
    theirs.save_pretrained(tmp_path)
    ours = from_adapters(TINY[family]().eval(), {"only": tmp_path}, verbose=False)
    same(answer(ours), answer(theirs))
    assert (answer(ours) - answer(TINY[family]().eval())).abs().max() > 0.01


def test_patterns_of_ranks_and_alphas_are_pefts(tmp_path):
    peft = pytest.importorskip("peft")
    patterns = {"rank_pattern": {r"layers\.1\..*q_proj": 3}, "alpha_pattern": {"v_proj": 5, "0.self_attn.q_proj": 7}}
    theirs = peft.get_peft_model(TINY["llama"](), peft.LoraConfig(r=2, target_modules=ATTENTION, **patterns)).eval()
    fill(theirs)
    theirs.save_pretrained(tmp_path)
    same(answer(library({"only": tmp_path})), answer(theirs))


def test_names_of_an_adapter_inside_the_keys_are_read(tmp_path, folders):
    old = load_file(folders["law"] / "adapter_model.safetensors")
    renamed = make_adapter(tmp_path / "renamed")
    save_file(
        {key.replace(".weight", ".default.weight").removeprefix("base_model.model."): t for key, t in old.items()},
        renamed / "adapter_model.safetensors",
    )
    assert torch.equal(answer(library({"a": renamed})), answer(library({"a": folders["law"]})))


def test_every_map_has_the_adapters_that_adapt_it_filled_up_to_one_rank(folders):
    made = {name.partition("layers.")[2]: layer.experts for name, layer in layers(library(folders)).items()}
    assert {name: experts.names for name, experts in made.items() if name.startswith("1")} == {
        "1.self_attn.q_proj": ("law", "med"),
        "1.self_attn.v_proj": ("law", "med", "bio"),
        "1.mlp.down_proj": ("med", "bio"),
    }
    assert {experts.rank for experts in made.values()} == {4}
    low = read_adapter(folders["law"]).modules["model.layers.1.self_attn.v_proj"]
    torch.testing.assert_close(made["1.self_attn.v_proj"].delta(0), 4 / 2 * low.B @ low.A)


def test_a_router_takes_all_adapters_where_there_are_fewer_than_k(tmp_path, folders):
    model = library(folders | {"out": make_adapter(tmp_path / "out", ["o_proj"])}, partial(TopK, k=3))
    found = {
        name.rpartition(".")[2]: (layer.router.k, layer.experts.num_experts) for name, layer in layers(model).items()
    }
    assert found == {"q_proj": (2, 2), "v_proj": (3, 3), "down_proj": (2, 2), "o_proj": (1, 1)}


def test_a_router_that_cannot_serve_is_refused_by_the_name_of_the_map_and_nothing_changes(folders):
    base = TINY["llama"]().eval()
    before = list(dict(base.named_modules()))
    with pytest.raises(ValueError, match=r"q_proj, which law, med adapt, cannot be made; choose one that serves 2"):
        from_adapters(base, folders, partial(Uniform, weights=[1, 1, 1]))
    with pytest.raises(ValueError, match="is in a decoder, and ExpertChoice decides by looking at later tokens"):
        from_adapters(base, folders, ExpertChoice)
    assert list(dict(base.named_modules())) == before


def test_the_order_of_the_adapters_does_not_matter(folders):
    torch.testing.assert_close(answer(library(folders)), answer(library(dict(reversed(folders.items())))))


def test_gates_in_the_folders_become_the_rows_of_the_routers(folders):
    for name in folders:
        gates = load_file(folders[name] / "gates.safetensors")
        assert {f"{module} gate" for module in gates} == {key for key in state(library(folders), name) if "gate" in key}
        assert all(torch.equal(state(library(folders), name)[f"{module} gate"], gate) for module, gate in gates.items())


@pytest.mark.parametrize("router", [Phatgoose, Uniform, Arrow, partial(TopK, k=3)])
def test_growing_a_pool_is_making_it_with_one_more(router, folders):
    arriving = {"bio": folders.pop("bio")}
    model = add_adapter(library(folders, router), "bio", arriving["bio"], verbose=False)
    torch.testing.assert_close(answer(model), answer(library(folders | arriving, router)))


def test_who_is_in_a_pool_stays_as_it_is_when_another_comes(folders):
    bio = folders.pop("bio")
    model = library(folders, TopK)
    for layer in layers(model).values():
        nn.init.normal_(layer.router.weight)
        layer.experts.lora_A.requires_grad_(False)
    before = {name: {key: t.clone() for key, t in state(model, name).items()} for name in folders}
    add_adapter(model, "bio", bio, verbose=False)
    after = {name: state(model, name) for name in folders}
    assert all(torch.equal(after[name][key], tensor) for name in folders for key, tensor in before[name].items())
    known = [layer.experts for layer in layers(model).values() if layer.experts.names != ("bio",)]
    assert not any(experts.lora_A.requires_grad for experts in known)
    assert all(experts.lora_B.requires_grad for experts in known)


def test_a_pool_grows_into_maps_that_had_no_adapter(tmp_path, folders):
    new = make_gates(make_adapter(tmp_path / "new", ["o_proj"]))
    model = add_adapter(library(folders), "new", new, verbose=False)
    assert torch.equal(answer(model), answer(library(folders | {"new": new})))
    assert len({id(layer.context) for layer in layers(model).values()}) == 1


def test_one_decision_for_all_maps_needs_the_same_adapters_in_each(folders, tmp_path):
    decided = partial(shared_routing, router=Phatgoose)
    with pytest.raises(ValueError, match=r"v_proj is adapted by law, med, bio and .*q_proj by law, med, so that one"):
        library(folders, decided)
    alike = {name: make_adapter(tmp_path / f"{name} alike", seed=seed) for seed, name in enumerate("abc")}
    model = library({name: alike[name] for name in "ab"}, decided)
    add_adapter(model, "c", alike["c"], verbose=False)
    with record(model) as decisions:
        answer(model)
    first, *others = (decision.counts.tolist() for decision in decisions.values())
    assert len(first) == 3
    assert all(counts == first for counts in others)


def test_adapters_that_were_trained_as_experts_take_another_among_them(folders):
    model = adapted_llama(router=partial(TopK, k=1, normalize=False))
    add_adapter(model, "law", folders["law"], verbose=False)
    assert {layer.experts.names for layer in layers(model).values()} == {("0", "1"), ("0", "1", "law")}


@pytest.mark.parametrize("router", [Phatgoose, partial(TopK, k=1, normalize=False, scale=2.0), Arrow])
def test_a_pool_is_restored_exactly(router, folders, tmp_path):
    model = library(dict(reversed(folders.items())), router, dropout=0.1)
    save_adapters(model, tmp_path / "library")
    again = load_adapters(TINY["llama"]().eval(), tmp_path / "library")
    assert torch.equal(answer(again), answer(model))
    assert repr(again) == repr(model)
    assert {key: t.tolist() for key, t in again.state_dict().items()} == {
        key: t.tolist() for key, t in model.state_dict().items()
    }


def test_experts_that_were_trained_together_become_adapters_and_come_back(tmp_path):
    model = adapted_llama(router=partial(TopK, k=1, normalize=False))
    save_adapters(model, tmp_path)
    again = load_adapters(TINY["llama"]().eval(), tmp_path)
    assert torch.equal(answer(again), answer(model))
    save_adapters(again, tmp_path / "twice")
    for file in ("router.safetensors", "moeify.json", "1/adapter_model.safetensors", "1/adapter_config.json"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


def test_a_router_of_your_own_is_given_when_loading(folders, tmp_path):
    save_adapters(library(folders), tmp_path / "library")
    again = load_adapters(TINY["llama"]().eval(), tmp_path / "library", router=partial(TopK, k=2), verbose=True)
    assert all(isinstance(layer.router, TopK) for layer in layers(again).values())
    with pytest.raises(ValueError, match="has no name, so a file cannot refer to it"):
        save_adapters(library(folders, lambda width, experts: TopK(width, experts)), tmp_path / "library")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_peft_computes_with_saved_adapters_what_each_of_them_adds(family, tmp_path):
    peft = pytest.importorskip("peft")
    maps = {name: part for name, part in TINY[family]().named_modules() if type(part).__name__ in ("Linear", "Conv1D")}
    maps = {name: part for name, part in maps.items() if name != "lm_head"}
    model = sparsify(
        TINY[family]().eval(),
        Recipe(where=linears(), num_experts=2, experts=lora, shared=frozen, router=TopK),
        verbose=False,
    )
    fill(model)
    for i, layer in enumerate(layers(model).values()):  # ranks and scales that differ from map to map
        layer.experts.scale[:] = torch.tensor([0.5, 1 / 3]) * (1 + i % 2)
        for bank, cut in ((layer.experts.lora_A, 1), (layer.experts.lora_B, 2)):
            bank.data.narrow(cut, 2 + i % 3, 6 - i % 3).zero_()
    assert set(maps) == set(layers(model))
    save_adapters(model, tmp_path)
    for name in ("0", "1"):
        theirs = peft.PeftModel.from_pretrained(TINY[family](), tmp_path / name).eval()
        ours = merge_into_base(copy.deepcopy(model), {name: 1.0})
        same(answer(theirs), answer(ours))


def test_the_table_says_who_is_where_and_whose_gates_are_missing(folders, capsys):
    for file in ("gates.safetensors", "SHA256.json"):
        (folders["bio"] / file).unlink()
    model = from_adapters(TINY["llama"](), folders, Phatgoose)
    assert "no gates in the folders of bio: their rows of the routers are still" in capsys.readouterr().out
    show_adapters(model, console := Console(record=True, width=120))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()]
    assert ["model.layers.*.self_attn.v_proj", "2", "law (2), med (4), bio (1)", "Phatgoose"] in rows
    assert ["model.layers.*.self_attn.q_proj", "2", "law (2), med (4)", "Phatgoose"] in rows


def test_a_pool_keeps_the_dtype_of_its_base_and_exact_scales(folders):
    base = TINY["llama"]().bfloat16()
    model = from_adapters(base, folders, Phatgoose, verbose=False)
    banks = [part for part in model.modules() if isinstance(part, LoRA)]
    assert {bank.lora_A.dtype for bank in banks} == {torch.bfloat16}
    assert {bank.scale.dtype for bank in banks} == {torch.float32}
    assert answer(model).isfinite().all()
    assert set(adapters_of(model)) == set(folders)


def test_a_library_saved_before_its_parts_were_renamed_still_loads(tmp_path):
    folder = tmp_path / "pool"
    for e, name in enumerate(("law", "verse")):
        make_gates(make_adapter(folder / name, rank=2, seed=e), e)
    expected = library({name: folder / name for name in ("law", "verse")})
    routers = {f"{module}.router.weight": layer.router.weight for module, layer in layers(expected).items()}
    saved = {name.replace(".router.weight", ".weight"): weight.detach().clone() for name, weight in routers.items()}
    save_file(saved, folder / "router.safetensors")
    description = {"moeify": "0.1.0", "router": "phatgoose", "dropout": 0.0, "adapters": ["law", "verse"]}
    (folder / "moeify.json").write_text(json.dumps(description))
    assert torch.equal(answer(load_adapters(TINY["llama"]().eval(), folder)), answer(expected))


def test_adapters_without_names_are_refused(folders):
    with pytest.raises(TypeError, match=r"folders by name, .* not a list"):
        from_adapters(TINY["llama"](), list(folders.values()))


def test_save_of_a_library_names_save_adapters_and_writes_nothing(folders, tmp_path):
    quantized = library(folders)
    quantize_module(quantized, "lm_head", 8, 32)
    for model in (library(folders), load_adapters(TINY["llama"](), saved(folders, tmp_path / "library")), quantized):
        with pytest.raises(ValueError, match=r"no recipe makes: moeify\.save_adapters\(model, folder\) writes them"):
            save(model, tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_a_library_whose_base_is_trained_is_not_sent_back_to_save(folders, tmp_path):
    model = library(folders)
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"freeze it if it is still that of the base, or merge .* \(merge_into_base\)"):
        save_adapters(model, tmp_path / "new")


def saved(folders, folder):
    save_adapters(library(folders), folder)
    return folder
