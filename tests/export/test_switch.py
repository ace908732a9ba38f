"""A T5 with top-1 experts is Switch Transformers, field by field; a model of that class is written back bit for bit."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, PreTrainedConfig, T5Config, T5ForConditionalGeneration

import moe_families
from export_models import shown
from moeify import Recipe, export, sparsify
from moeify.export import HfFolder
from moeify.export.switch import SWITCH
from moeify.find.where import every, ffn
from moeify.routers import TopK
from moeify.serve import serve_with
from moeify.sparsify import recipes
from moeify.sparsify.make import fresh
from moeify.sparsify.shared import dense

SIZES = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_heads": 4}
TOP_1 = partial(TopK, k=1, normalize=False)


def sparse(recipe="switch", *, capacity=math.inf, **config):
    torch.manual_seed(0)
    made = recipes[recipe] if isinstance(recipe, str) else recipe
    model = T5ForConditionalGeneration(T5Config(**SIZES | {"decoder_start_token_id": 0} | config))
    model = sparsify(model, made, verbose=False).eval()
    has_capacity = recipe == "switch" and capacity is not None
    return shown(serve_with(model, capacity=capacity) if has_capacity else model)


def top_1(**options):
    return Recipe(**{"where": ffn, "num_experts": 4, "router": TOP_1, "experts": fresh} | options)


FLIPS = {
    "vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 40, "num_layers": 6, "num_decoder_layers": 2, "num_heads": 2,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6, "layer_norm_epsilon": 0.3,
    "dropout_rate": 0.3, "initializer_factor": 0.5, "pad_token_id": 7, "eos_token_id": [3, 4],
    "feed_forward_proj": "gelu_new",
}  # fmt: skip


@pytest.mark.parametrize(
    "model", [sparse, partial(sparse, **FLIPS), partial(sparse, top_1(experts=partial(fresh, hidden=20)))]
)
def test_a_t5_with_top_1_experts_is_switch_transformers(model, tmp_path):
    model = model()
    done = export.write(model, tmp_path / "out")
    assert done.notes == ["Switch Transformers (SwitchTransformersForConditionalGeneration)"]
    assert done.verification.difference < 1e-5
    assert export.verify(tmp_path / "out").difference <= done.verification.difference
    config = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").config
    for name in ("dropout_rate", "initializer_factor", "pad_token_id", "eos_token_id", "decoder_start_token_id"):
        assert getattr(config, name) == getattr(model.config, name)


def test_every_field_of_t5_is_flipped_or_known_to_have_no_effect():
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(T5Config)} - inherited
    assert own - {*FLIPS} <= SWITCH.fields | {"classifier_dropout"}


def test_outputs_that_are_not_scaled_are_those_of_a_head_of_its_own(tmp_path):
    done = export.write(sparse(tie_word_embeddings=False), tmp_path / "out")
    assert done.notes[1:] == ["the embeddings are written four times, for each of their uses"]
    assert done.verification.difference < 1e-4


def test_a_model_of_the_class_is_written_back_bit_for_bit(tmp_path):
    model = shown(moe_families.build("switch_transformers", num_hidden_layers=2, expert_capacity=1))
    done = export.write(model, tmp_path / "out", exporter=HfFolder("switch_transformers"))
    assert done.verification.difference == 0
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (partial(sparse, capacity=None), r"serve_with\(model, capacity=float\('inf'\)\)"),
        (partial(sparse, top_1(router=TopK)), r"\(top-1, softmax\), and the model's router has k=2, normalize=True"),
        (partial(sparse, top_1(shared=dense)), "sparse layers have more than experts"),
        (partial(sparse, top_1(where=every(3))), "sparse blocks are every block, or the second"),
        (partial(sparse, feed_forward_proj="gated-gelu"), r"networks are gated \(gated-gelu\)"),
        (partial(T5ForConditionalGeneration, T5Config(**SIZES)), "has no sparse layers of moeify"),
    ],
)
def test_what_switch_transformers_does_not_compute_is_refused(model, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        export.write(model(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_programs_refuse_it():
    for to in ("gguf", "mlx"):
        assert "no causal language model that can be exported" in export.find_exporter(to).supports(sparse())
