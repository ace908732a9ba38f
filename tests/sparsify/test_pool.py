import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moeify import MoE, Recipe, from_adapters, load, load_adapters, record, save, save_adapters, sparsify
from moeify.experts import FFN, LoRA
from moeify.routers import Arrow, ExpertChoice, Phatgoose, TopK, Uniform
from moeify.routers.once import once
from moeify.sparsify import (
    adapters_of,
    add_adapter,
    bake,
    dense,
    ffn,
    frozen,
    linears,
    lora,
    lora_ffn,
    merge_into_dense,
    save_gates,
    show_pool,
)
from moeify.sparsify.adapter_files import Adapter, LowRank, read_adapter, write_adapter
from strategies import seeds
from tiny_models import TINY, inputs

ATTENTION = ["q_proj", "v_proj"]


def make_adapter(folder: Path, targets=ATTENTION, rank: int = 2, *, seed: int = 0, base=None, **config) -> Path:
    """The folder of an adapter of the tiny Llama as PEFT would write it, with random weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, part in (TINY["llama"]() if base is None else base).named_modules():
        if name.rpartition(".")[2] in targets and isinstance(part, nn.Linear):
            A = torch.randn(rank, part.in_features, generator=generator) * 0.3
            B = torch.randn(part.out_features, rank, generator=generator) * 0.3
            tensors |= {f"base_model.model.{name}.lora_{side}.weight": t for side, t in (("A", A), ("B", B))}
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "bias": "none", "target_modules": targets} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def make_gates(folder: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    maps = read_adapter(folder).maps
    save_gates({name: torch.randn(low.A.shape[1], generator=generator) for name, low in maps.items()}, folder)
    return folder


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """Three adapters with gates: of different ranks, and of maps that overlap in part."""
    made = {
        "law": make_adapter(tmp_path / "law", rank=2, seed=1),
        "med": make_adapter(tmp_path / "med", [*ATTENTION, "down_proj"], rank=4, seed=2),
        "bio": make_adapter(tmp_path / "bio", ["v_proj", "down_proj"], rank=1, seed=3),
    }
    return {name: make_gates(folder, seed) for seed, (name, folder) in enumerate(made.items())}


def pool(folders: dict[str, Path], router=Phatgoose, **options) -> nn.Module:
    return from_adapters(TINY["llama"]().eval(), folders, router, verbose=False, **options)


def layers(model: nn.Module) -> dict[str, MoE]:
    return {name: part for name, part in model.named_modules() if isinstance(part, MoE)}


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What a pool holds of one adapter."""
    found = {}
    for module, layer in layers(model).items():
        if name in layer.experts.names:
            e = layer.experts.names.index(name)
            found |= {f"{module} {key}": t[e] for key, t in layer.experts.state_dict().items()}
            found[f"{module} gate"] = layer.router.weight[e]
    return found


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


def fill(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)


def test_patterns_of_ranks_and_alphas_are_pefts(tmp_path):
    peft = pytest.importorskip("peft")
    patterns = {"rank_pattern": {r"layers\.1\..*q_proj": 3}, "alpha_pattern": {"v_proj": 5, "0.self_attn.q_proj": 7}}
    theirs = peft.get_peft_model(TINY["llama"](), peft.LoraConfig(r=2, target_modules=ATTENTION, **patterns)).eval()
    fill(theirs)
    theirs.save_pretrained(tmp_path)
    same(answer(pool({"only": tmp_path})), answer(theirs))


def test_names_of_an_adapter_inside_the_keys_are_read(tmp_path, folders):
    old = load_file(folders["law"] / "adapter_model.safetensors")
    renamed = make_adapter(tmp_path / "renamed")
    save_file(
        {key.replace(".weight", ".default.weight").removeprefix("base_model.model."): t for key, t in old.items()},
        renamed / "adapter_model.safetensors",
    )
    assert torch.equal(answer(pool({"a": renamed})), answer(pool({"a": folders["law"]})))


def test_every_map_has_the_adapters_that_adapt_it_filled_up_to_one_rank(folders):
    made = {name.partition("layers.")[2]: layer.experts for name, layer in layers(pool(folders)).items()}
    assert {name: experts.names for name, experts in made.items() if name.startswith("1")} == {
        "1.self_attn.q_proj": ("law", "med"),
        "1.self_attn.v_proj": ("law", "med", "bio"),
        "1.mlp.down_proj": ("med", "bio"),
    }
    assert {experts.rank for experts in made.values()} == {4}
    low = read_adapter(folders["law"]).maps["model.layers.1.self_attn.v_proj"]
    torch.testing.assert_close(made["1.self_attn.v_proj"].delta(0), 4 / 2 * low.B @ low.A)


def test_a_router_takes_all_adapters_where_there_are_fewer_than_k(tmp_path, folders):
    model = pool(folders | {"out": make_adapter(tmp_path / "out", ["o_proj"])}, partial(TopK, k=3))
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
    torch.testing.assert_close(answer(pool(folders)), answer(pool(dict(reversed(folders.items())))))


def test_gates_in_the_folders_become_the_rows_of_the_routers(folders):
    for name in folders:
        gates = load_file(folders[name] / "gates.safetensors")
        assert {f"{module} gate" for module in gates} == {key for key in state(pool(folders), name) if "gate" in key}
        assert all(torch.equal(state(pool(folders), name)[f"{module} gate"], gate) for module, gate in gates.items())


@pytest.mark.parametrize("router", [Phatgoose, Uniform, Arrow, partial(TopK, k=3)])
def test_growing_a_pool_is_making_it_with_one_more(router, folders):
    arriving = {"bio": folders.pop("bio")}
    model = add_adapter(pool(folders, router), "bio", arriving["bio"], verbose=False)
    torch.testing.assert_close(answer(model), answer(pool(folders | arriving, router)))


def test_who_is_in_a_pool_stays_as_it_is_when_another_comes(folders):
    bio = folders.pop("bio")
    model = pool(folders, TopK)
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
    model = add_adapter(pool(folders), "new", new, verbose=False)
    assert torch.equal(answer(model), answer(pool(folders | {"new": new})))
    assert len({id(layer.context) for layer in layers(model).values()}) == 1


def test_one_decision_for_all_maps_needs_the_same_adapters_in_each(folders, tmp_path):
    decided = partial(once, router=Phatgoose)
    with pytest.raises(ValueError, match=r"v_proj is adapted by law, med, bio and .*q_proj by law, med, so that one"):
        pool(folders, decided)
    alike = {name: make_adapter(tmp_path / f"{name} alike", seed=seed) for seed, name in enumerate("abc")}
    model = pool({name: alike[name] for name in "ab"}, decided)
    add_adapter(model, "c", alike["c"], verbose=False)
    with record(model) as decisions:
        answer(model)
    first, *others = (decision.counts.tolist() for decision in decisions.values())
    assert len(first) == 3
    assert all(counts == first for counts in others)


def adapted_llama(**recipe) -> nn.Module:
    parts = {"where": linears("_proj"), "experts": partial(lora, rank=3), "shared": frozen, "num_experts": 2} | recipe
    model = sparsify(TINY["llama"]().eval(), Recipe(**parts), verbose=False)
    fill(model)
    return model


def test_adapters_that_were_trained_as_experts_take_another_among_them(folders):
    model = adapted_llama(router=partial(TopK, k=1, normalize=False))
    add_adapter(model, "law", folders["law"], verbose=False)
    assert {layer.experts.names for layer in layers(model).values()} == {("0", "1"), ("0", "1", "law")}


@pytest.mark.parametrize("router", [Phatgoose, partial(TopK, k=1, normalize=False, scale=2.0), Arrow])
def test_a_pool_is_restored_exactly(router, folders, tmp_path):
    model = pool(dict(reversed(folders.items())), router, dropout=0.1)
    save_adapters(model, tmp_path / "pool")
    again = load_adapters(TINY["llama"]().eval(), tmp_path / "pool")
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
    save_adapters(pool(folders), tmp_path / "pool")
    again = load_adapters(TINY["llama"]().eval(), tmp_path / "pool", router=partial(TopK, k=2), verbose=True)
    assert all(isinstance(layer.router, TopK) for layer in layers(again).values())
    with pytest.raises(ValueError, match="has no name, so a file cannot refer to it"):
        save_adapters(pool(folders, lambda width, experts: TopK(width, experts)), tmp_path / "pool")


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
        ours = merge_into_dense(copy.deepcopy(model), {name: 1.0})
        same(answer(theirs), answer(ours))


@given(st.lists(st.tuples(st.integers(1, 4), st.floats(0.125, 9, width=32)), min_size=1, max_size=4), seeds)
def test_an_adapter_comes_back_from_its_files_exactly(tmp_path_factory, sizes, seed):
    torch.manual_seed(seed)
    maps = {
        f"layers.{i}.fc": LowRank(torch.randn(rank, 5), torch.randn(6, rank), scale)
        for i, (rank, scale) in enumerate(sizes)
    }
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(Adapter(maps), folder, targets=["fc"], transposed=False, base="")
    again = read_adapter(folder).maps
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
        pool({"a": make_adapter(tmp_path / "a", **config)})


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        (
            "base_model.model.model.embed_tokens.lora_embedding_A",
            (2, 256),
            "adapts an embedding, which is no linear map",
        ),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector", (32,), "DoRA"),
        ("base_model.model.model.norm.weight", (32,), "not one of a LoRA beside a linear map"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", (2, 32), r"up_proj has lora_A \(2, 32\)"),
    ],
)
def test_tensors_that_are_not_of_a_lora_are_named(key, shape, message, tmp_path):
    file = make_adapter(tmp_path / "a") / "adapter_model.safetensors"
    save_file(load_file(file) | {key: torch.zeros(shape)}, file)
    with pytest.raises(ValueError, match=message):
        pool({"a": tmp_path / "a"})


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


def test_maps_that_are_not_called_cannot_have_adapters(tmp_path):
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False)
    with pytest.raises(ValueError, match=r"self_attn.out_proj, a NonDynamically.* only linear maps that are called"):
        from_adapters(base, {"a": make_adapter(tmp_path / "a", ["out_proj"], base=base)})
    x = torch.randn(2, 5, 16)
    before = base.eval()(x)
    from_adapters(base, {"b": make_adapter(tmp_path / "b", ["linear1"], base=base)}, verbose=False)
    assert (base(x) - before).abs().max() > 0.01


def test_missing_and_unsafe_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not the folder of a PEFT adapter"):
        pool({"a": tmp_path})
    folder = make_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle, which may run code"):
        pool({"a": folder})
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="nothing of the adapter 'a' attaches"):
        pool({"a": folder})
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is damaged or not a safetensors file"):
        pool({"a": folder})
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a mapping"):
        pool({"a": folder})


def test_names_that_cannot_be_folders_or_are_taken_are_refused(folders):
    with pytest.raises(ValueError, match=r"cannot be called '../law'"):
        pool({"../law": folders["law"]})
    with pytest.raises(ValueError, match="has an adapter 'law' already"):
        add_adapter(pool(folders), "law", folders["law"])
    with pytest.raises(ValueError, match="sparse already"):
        from_adapters(pool(folders), folders)
    with pytest.raises(ValueError, match="there is no adapter to attach"):
        pool({})
    with pytest.raises(ValueError, match="has no adapters; make a pool"):
        add_adapter(TINY["llama"](), "law", folders["law"])


def test_a_gate_of_another_width_is_refused(folders):
    save_gates({"model.layers.0.self_attn.q_proj": torch.ones(3)}, folders["law"])
    with pytest.raises(ValueError, match=r"the gate of model.layers.0.self_attn.q_proj of the adapter 'law' is \(3,\)"):
        pool(folders)


def test_damaged_pools_are_refused(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not written by moeify\.save_adapters"):
        load_adapters(TINY["llama"](), tmp_path / "law")
    save_adapters(pool(folders), tmp_path / "pool")
    routers = load_file(tmp_path / "pool/router.safetensors")
    routers.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(routers, tmp_path / "pool/router.safetensors")
    with pytest.raises(ValueError, match=r"lacks model.layers.0.self_attn.q_proj.weight"):
        load_adapters(TINY["llama"](), tmp_path / "pool")
    description = json.loads((tmp_path / "pool/moeify.json").read_text())
    (tmp_path / "pool/moeify.json").write_text(json.dumps(description | {"adapters": ["../law"]}))
    with pytest.raises(ValueError, match="cannot be called"):
        load_adapters(TINY["llama"](), tmp_path / "pool")
    (tmp_path / "pool/moeify.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged, or not written by"):
        load_adapters(TINY["llama"](), tmp_path / "pool")


def test_what_no_adapter_of_peft_can_be_is_not_written_as_one(tmp_path):
    with pytest.raises(ValueError, match="q_proj is trained with its adapters"):
        save_adapters(adapted_llama(shared=dense), tmp_path)
    with pytest.raises(ValueError, match="has LoRAFFN experts; bake"):
        save_adapters(adapted_llama(where=ffn, experts=lora_ffn, shared=lambda dense, width: None), tmp_path)
    with pytest.raises(ValueError, match="is no linear map with adapters beside it"):
        save_adapters(adapted_llama(where=ffn), tmp_path)


def test_the_table_says_who_is_where_and_whose_gates_are_missing(folders, capsys):
    (folders["bio"] / "gates.safetensors").unlink()
    model = from_adapters(TINY["llama"](), folders, Phatgoose)
    assert "no gates in the folders of bio: their rows of the routers are still" in capsys.readouterr().out
    show_pool(model, console := Console(record=True, width=120))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()]
    assert ["model.layers.*.self_attn.v_proj", "2", "law (2), med (4), bio (1)", "Phatgoose"] in rows
    assert ["model.layers.*.self_attn.q_proj", "2", "law (2), med (4)", "Phatgoose"] in rows


def networks(family: str, **recipe) -> nn.Module:
    model = TINY[family]().eval()
    parts = {"num_experts": 3, "router": TopK, "experts": partial(lora_ffn, rank=2, scale=0.5)} | recipe
    sparsify(model, Recipe(**parts), verbose=False)
    fill(model)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_baked_networks_compute_what_they_did_as_ordinary_experts(family, tmp_path):
    model = networks(family, router=partial(TopK, k=1, normalize=False))
    before = answer(model)
    bake(model)
    assert all(type(layer.experts) is FFN for layer in layers(model).values())
    same(answer(model), before)
    save(model, tmp_path)
    assert torch.equal(answer(load(tmp_path)), answer(model))


def test_what_decides_in_every_map_cannot_be_baked(folders):
    model = pool(folders)
    with pytest.raises(ValueError, match=r"q_proj and 5 other maps .* decide for themselves.*merge_into_dense"):
        bake(model)
    with pytest.raises(ValueError, match="has FFN experts, which are no low-rank changes"):
        bake(bake(networks("llama")))
    with pytest.raises(ValueError, match="there is nothing to bake"):
        bake(TINY["llama"]())


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_pool_under_fixed_weights_is_one_dense_model(family):
    weights = [0.5, -1.5, 2.0]
    where = linears("q_proj|down_proj|c_attn|c_fc|wo")
    model = TINY[family]().eval()
    parts = list(dict(model.named_modules()))
    recipe = Recipe(where=where, num_experts=3, router=partial(Uniform, weights=weights), experts=lora, shared=frozen)
    sparsify(model, recipe, verbose=False)
    fill(model)
    before = answer(model)
    merge_into_dense(model, dict(zip("012", weights, strict=True)))
    same(answer(model), before)
    assert list(dict(model.named_modules())) == parts
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_merging_leaves_tied_embeddings_as_they_are(tmp_path):
    model = TINY["gpt2"]().eval()
    from_adapters(model, {"head": make_adapter(tmp_path / "head", ["lm_head"], base=model)}, verbose=False)
    words = model.get_input_embeddings().weight
    before, logits = words.detach().clone(), answer(model)
    merge_into_dense(model, {"head": 1.0})
    assert torch.equal(words, before)
    same(answer(model), logits)


def test_only_adapters_that_are_there_can_be_merged(folders):
    with pytest.raises(ValueError, match="there is no adapter art; there are: bio, law, med"):
        merge_into_dense(pool(folders), {"art": 1.0})
    with pytest.raises(ValueError, match=r"has LoRAFFN experts; bake\(model\)"):
        merge_into_dense(networks("llama"), {"0": 1.0})


def test_a_pool_keeps_the_dtype_of_its_base_and_exact_scales(folders):
    base = TINY["llama"]().bfloat16()
    model = from_adapters(base, folders, Phatgoose, verbose=False)
    banks = [part for part in model.modules() if isinstance(part, LoRA)]
    assert {bank.lora_A.dtype for bank in banks} == {torch.bfloat16}
    assert {bank.scale.dtype for bank in banks} == {torch.float32}
    assert answer(model).isfinite().all()
    assert set(adapters_of(model)) == set(folders)
