"""Models that sparsify makes become classes of transformers that compute the same, field by field."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

import moe_families
from export_models import BASES, WHOLE_HEADS, router, shown, sparse
from moeify import Recipe, export, sparsify
from moeify.export import HfFolder, families
from moeify.find.where import every, last
from moeify.routers import ExpertChoice, ExpertGroups, TopK, sigmoid
from moeify.serve import serve_with
from moeify.sparsify import recipes
from moeify.sparsify.make import copies, fresh, masked
from moeify.sparsify.shared import dense, gated
from plain_models import encoder
from tiny_models import causal_lm, tokens

EXACT, ROUNDED = 0.0, 1e-5


@pytest.mark.parametrize(
    ("base", "recipe", "title", "rewrites", "at_most"),
    [
        ("llama", "mixtral", "Mixtral", 0, EXACT),
        ("llama", router(normalize=False, shared=gated), "Qwen2-MoE", 0, EXACT),
        ("llama", router(shared=dense), "GraniteMoeShared", 0, ROUNDED),
        ("llama", "deepseek", "GLM4-MoE", 0, ROUNDED),
        ("llama", "olmoe", "Qwen2-MoE", 1, EXACT),
        ("llama", "matched", "Ernie4.5-MoE", 2, ROUNDED),
        ("llama", "noisy", "Mixtral", 0, ROUNDED),
        ("llama", "mixlora", "Mixtral", 1, ROUNDED),
        ("llama", router(score=sigmoid, selection_bias=True, where=last(1)), "GLM4-MoE", 1, ROUNDED),
        ("mistral", router(experts=partial(masked, experts=fresh)), "Mixtral", 0, EXACT),
        ("qwen2", "matched", "Ernie4.5-MoE", 4, ROUNDED),
        ("qwen3", router(where=every(2)), "Qwen3-MoE", 0, EXACT),
        ("qwen3", "deepseek", "Dots1", 0, ROUNDED),
        ("olmo2", "olmoe", "FlexOlmo", 0, EXACT),
        ("ernie4_5", router(scale=2.0, selection_bias=True, where=every(2)), "Ernie4.5-MoE", 1, EXACT),
        ("stablelm", "phi", "PhiMoE", 0, EXACT),
        ("deepseek_v3", "deepseek", "DeepSeek-V3", 0, ROUNDED),
        ("deepseek_v3", "deepseek_v2", "DeepSeek-V2", 0, ROUNDED),
        ("deepseek_v3", router(normalize=False, shared=dense, scale=2.0), "DeepSeek-V2", 0, ROUNDED),
    ],
)
def test_a_sparse_model_is_a_class_of_transformers(base, recipe, title, rewrites, at_most, tmp_path):
    done = export.write(sparse(base, recipe), tmp_path / "out")
    assert done.notes[0].startswith(title)
    assert len(done.notes) == 1 + rewrites
    assert done.verification.difference <= at_most


FLIPS = {
    "hidden_act": "gelu", "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 0.3,
    "layer_norm_eps": 0.3, "tie_word_embeddings": True, "pad_token_id": 7, "bos_token_id": 9, "eos_token_id": [3, 4],
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "max_position_embeddings": 64, "vocab_size": 96, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 3,
    "attention_dropout": 0.1, "initializer_range": 0.3, "embedding_multiplier": 1.5, "residual_multiplier": 0.7,
    "attention_multiplier": 0.2, "logits_scaling": 3.0, "attention_bias": True, "use_qkv_bias": True,
    "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1, "layer_types": None,
    "q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4,
    "rope_interleave": False,
}  # fmt: skip
NOT_OF = {
    "stablelm": {"hidden_size", "num_attention_heads"}, "olmo2": {"num_attention_heads"},
    "deepseek_v3": {"num_key_value_heads", "num_attention_heads", "qk_rope_head_dim"}, "qwen3": {"max_window_layers"},
}  # fmt: skip
REFUSED = {
    ("llama", "mlp_bias"), ("granite", "mlp_bias"), ("ernie4_5", "use_bias"), ("stablelm", "qk_layernorm"),
    ("stablelm", "use_parallel_residual"), ("qwen3", "max_window_layers"),
}  # fmt: skip
SPARSE_BY = {"deepseek_v3": "deepseek", "stablelm": "phi"}


def own_fields(config_class):
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"tie_word_embeddings"}
    return {field.name for field in dataclasses.fields(config_class)} - inherited


@pytest.mark.parametrize("base", families.DENSE)
def test_every_field_of_a_dense_model_is_carried_over(base, tmp_path):
    own = own_fields(type(causal_lm(base, **BASES.get(base, {})).config))
    ruled = own & {name for rule in families.DENSE[base].rules.values() for name in rule.fields}
    assert own - families.DENSE[base].fields <= families.SPARSE["deepseek_v3"].fields
    assert ruled <= {*FLIPS} | {name for refused, name in REFUSED if refused == base}
    flips = {name: value for name, value in FLIPS.items() if name in ruled - NOT_OF.get(base, set())}
    if base == "stablelm":
        flips["rope_parameters"] = WHOLE_HEADS["rope_parameters"] | {"rope_theta": 50.0}
    done = export.write(sparse(base, SPARSE_BY.get(base, "mixtral"), **flips), tmp_path / "out")
    assert done.verification.difference < 1e-4


@pytest.mark.parametrize(("base", "flip"), sorted(REFUSED))
def test_a_field_that_no_class_has_is_refused(base, flip):
    flips = {flip: 1 if flip == "max_window_layers" else True, "use_sliding_window": True, "sliding_window": 4}
    model = sparse(base, router(), **flips)
    assert export.find_exporter("transformers").supports(model)


@pytest.mark.parametrize("family", families.SPARSE)
def test_a_class_with_experts_is_read_and_written_back_bit_for_bit(family, tmp_path):
    model = shown(moe_families.build(family))
    config_class = type(model.config)
    assert own_fields(config_class) <= families.SPARSE[family].fields
    done = export.write(model, tmp_path / "out", exporter=HfFolder(family))
    assert len(done.notes) == 1
    assert done.verification.difference == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_minimax_m2_rotates_a_half_of_every_head_as_in_its_released_checkpoints(tmp_path):
    half = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    model = shown(moe_families.build("minimax_m2", rope_parameters=half))
    assert export.write(model, tmp_path / "out").verification.difference == 0


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ("qwen3", "query key norm: always width, in the model head"),
        ("olmo2", "norms: always before, in the model after"),
    ],
)
def test_no_dense_class_has_the_attention_of_minimax_m2(base, reason):
    assert reason in HfFolder("minimax_m2").supports(sparse(base, "minimax_m2"))


def test_the_default_of_another_class_would_have_changed_the_logits_and_is_found(tmp_path):
    assert export.verify(export.write(sparse(), tmp_path / "out").folder).difference == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("rope_parameters")["rope_theta"] == config.pop("rope_theta") == 10000.0
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="other logits than the model"):
        export.verify(tmp_path / "out")


def test_a_folder_loads_in_a_process_that_cannot_import_moeify(tmp_path):
    ids = tokens()
    expected = {}
    for base, recipe in (("llama", "mixtral"), ("llama", "deepseek")):
        model = sparse(base, recipe)
        export.write(model, tmp_path / recipe)
        expected[recipe] = model(ids).logits
    torch.save(ids, tmp_path / "ids.pt")
    code = f"""
import sys, torch
sys.modules["moeify"] = None
from transformers import AutoModelForCausalLM
ids = torch.load({str(tmp_path / "ids.pt")!r})
for name in {list(expected)}:
    model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r} + "/" + name)
    torch.save(model(ids).logits, {str(tmp_path)!r} + "/" + name + ".pt")
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    for name, logits in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), logits, rtol=0, atol=1e-5)


def test_half_precision_stays_as_it_is(tmp_path):
    model = sparse("llama", router(score=sigmoid, selection_bias=True)).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rotary = model.model.rotary_emb.inv_freq.clone()
    done = export.write(model, tmp_path / "out")
    assert done.verification.difference < 1e-5
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert again.model.layers[0].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model.model.rotary_emb.inv_freq, rotary)


GROUPS = ExpertGroups(count=2, keep=1, reduce="max")


@pytest.mark.parametrize(
    ("base", "recipe", "reason"),
    [
        ("llama", "soft", "router, Soft, does not choose the top k"),
        ("llama", Recipe(router=ExpertChoice, experts=fresh), "router, ExpertChoice, does not choose the top k"),
        ("llama", "switch", r"serve_with\(model, capacity=float\('inf'\)\)"),
        ("llama", "longcat", "experts, Blocks, are not feed-forward networks"),
        ("llama", "phi", "Mixtral, score: always softmax, in the model sparsemixer"),
        ("llama", "stmoe", "drops rows beyond a capacity"),
        ("llama", "phatgoose", "sparse layer model.layers.0.self_attn.q_proj replaces a single linear layer"),
        ("llama", router(per="sequence"), "decides once per sequence"),
        ("llama", "deepseek_v2", "groups"),
        ("llama", router(bias=True), "projection of its router has a bias"),
        ("llama", router(expert_groups=GROUPS), "Mixtral, groups"),
        ("llama", router(score=torch.exp), "the score function exp"),
        ("qwen3", "matched", "Qwen3-MoE, selection bias: always False, in the model True"),
        ("olmo2", "deepseek", "FlexOlmo, score: always softmax, in the model sigmoid"),
        (
            "gemma",
            "mixtral",
            "GemmaForCausalLM has sparse layers of moeify, but is no causal language model that can be exported",
        ),
    ],
)
def test_what_no_class_computes_is_refused_with_the_reason(base, recipe, reason, tmp_path):
    recipe = recipes[recipe] if isinstance(recipe, str) else recipe
    layers = {"num_hidden_layers": 4} if recipe is recipes["stmoe"] else {}
    model = shown(sparsify(causal_lm(base, **layers), recipe, verbose=False, allow_noncausal=True))
    with pytest.raises(ValueError, match=reason):
        export.write(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_capacity_that_is_off_in_evaluation_is_no_hindrance(tmp_path):
    model = serve_with(sparse("llama", "switch"), capacity=float("inf"))
    done = export.write(model, tmp_path / "out")
    assert done.notes[0].startswith("Qwen2-MoE")
    assert done.verification.difference == 0


def test_a_model_of_no_class_of_the_table_is_refused():
    model = sparsify(encoder(), Recipe(num_experts=4), verbose=False)
    for to in ("transformers", "gguf", "mlx"):
        assert "no causal language model that can be exported" in export.find_exporter(to).supports(model)


def test_layers_that_differ_are_refused():
    model = sparse()
    model.model.layers[1].mlp.router.k = 1
    reason = export.find_exporter("transformers").supports(model)
    assert "k is 2 in model.layers.0.mlp and 1 in model.layers.1.mlp" in reason


def test_nothing_is_left_of_an_export_that_fails_or_would_overwrite(tmp_path, monkeypatch):
    model = sparse()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        export.write(model, tmp_path / "full")
    monkeypatch.setattr("moeify.export.hf_folder.logits_of", lambda model, ids: torch.zeros(*ids.shape, 256))
    with pytest.raises(ValueError, match="other logits than the model"):
        export.write(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_a_class_may_be_asked_for(tmp_path):
    model = sparse("llama", Recipe(num_experts=4, router=partial(TopK, score=sigmoid), experts=copies))
    done = export.write(model, tmp_path / "out", exporter=HfFolder("glm4_moe"))
    assert done.notes[1:] == ["a selection bias of zeros is added", "a shared expert of 0 units is added"]
    with pytest.raises(ValueError, match="score: always softmax, in the model sigmoid"):
        export.write(model, tmp_path / "other", exporter=HfFolder("mixtral"))
    with pytest.raises(ValueError, match="did you mean 'mixtral'"):
        export.write(model, tmp_path / "other", exporter=HfFolder("mixtrl"))


def test_every_exporter_is_asked_and_graphs_are_traced_once(monkeypatch):
    traces = []
    monkeypatch.setattr("moeify.export.graph._program", lambda *call: traces.append(call))
    answers = export.supports(sparse())
    assert list(answers) == export.exporters()
    assert not any(answers.values())
    assert len(traces) == 1
