"""Traces of models that see no text alone: images, speech, images beside text, tables of users, adapters as experts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import plain_models
import tiny_models
from adapter_folders import library, make_adapter, make_gates
from moeify import MoE, Recipe, record, sparsify
from moeify.experts import FFN
from moeify.inspect.capture import capture
from moeify.inspect.trace import Trace
from moeify.routers import MoLE, MultiGate, Phatgoose
from moeify.sparsify import frozen, lora

FOUR = Recipe(num_experts=4)


def traced(model: nn.Module, batch: object) -> Trace:
    """The trace, which counts the rows that `record` sees in the same pass."""
    with record(model) as decisions:
        trace = capture(model, [batch])
    assert trace.layers.keys() == decisions.keys()
    for name, layer in trace.layers.items():
        assert torch.equal(layer.counts, decisions[name].counts)
    return trace


def modalities(trace: Trace) -> list[set[str]]:
    return [{table.modalities[i] for i in table.modality.tolist()} for table in trace.tables]


def without_labels(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tiny_models.inputs(model).items() if name != "labels"}


def test_patches_are_tokens_of_their_image():
    model = sparsify(tiny_models.vit(), FOUR, verbose=False)
    (tokens,) = traced(model, without_labels(model)).tables
    assert tokens.ids is None
    assert tokens.sequence.tolist() == [0] * 17 + [1] * 17
    assert tokens.position.tolist() == [*range(17)] * 2
    assert tokens.modalities == ("image",)


def test_a_speech_model_hears_in_its_encoder_and_writes_in_its_decoder():
    model = sparsify(tiny_models.whisper(), FOUR, verbose=False)
    batch = without_labels(model) | {"decoder_input_ids": tiny_models.tokens(2, 5)}
    trace = traced(model, batch)
    assert modalities(trace) == [{"audio"}, {"text"}]
    sound, text = trace.tables
    assert sound.sequence.tolist() == [0] * 16 + [1] * 16
    assert text.ids.tolist() == batch["decoder_input_ids"].flatten().tolist()


def test_towers_of_images_and_text_have_tables_of_their_own():
    model = sparsify(tiny_models.clip(), FOUR, verbose=False)
    batch = tiny_models.inputs(model)
    trace = traced(model, batch)
    by_tower = {name.split("_model")[0]: layer.tokens for name, layer in trace.layers.items()}
    assert by_tower["vision"].ids is None
    assert by_tower["vision"].modalities == ("image",)
    assert by_tower["text"].ids.tolist() == batch["input_ids"].flatten().tolist()
    assert by_tower["text"].modalities == ("text",)


def test_images_among_words_are_found_by_their_mark():
    model = tiny_models.mixtral()
    model.config.image_token_id = 7
    (tokens,) = traced(model, {"input_ids": torch.tensor([[7, 7, 9, 4]])}).tables
    assert [tokens.modalities[i] for i in tokens.modality] == ["image", "image", "text", "text"]


def test_rows_of_a_recommender_are_sequences_of_one():
    model = sparsify(plain_models.Recommender(), FOUR, verify=False, verbose=False)
    user, item = torch.arange(6), torch.arange(6)
    (tokens,) = traced(model, {"user": user, "item": item, "domain": [*"aabbab"]}).tables
    assert tokens.sequence.tolist() == [*range(6)]
    assert "".join(tokens.domains[i] for i in tokens.domain) == "aabbab"


@pytest.mark.parametrize("router", [Phatgoose, MoLE], ids=["phatgoose", "mole"])
def test_adapters_of_a_library_are_experts(router, tmp_path: Path):
    folders = {name: make_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("abc")}
    if router is Phatgoose:
        for seed, folder in enumerate(folders.values()):
            make_gates(folder, seed)
    model = library(folders, router)
    trace = traced(model, {"input_ids": tiny_models.tokens(2, 5)})
    assert len(trace.layers) == 4
    assert {layer.num_experts for layer in trace} == {3}
    assert len(trace.tables) == 1


def test_lora_experts_beside_a_frozen_network_are_traced():
    recipe = Recipe(num_experts=4, experts=partial(lora, rank=2), shared=frozen)
    trace = traced(
        sparsify(tiny_models.causal_lm("llama"), recipe, verbose=False), {"input_ids": tiny_models.tokens(2, 5)}
    )
    assert all(layer.num_experts == 4 and layer.k == 2 for layer in trace)


def test_several_gates_give_a_row_the_sum_of_their_weights():
    trace = traced(nn.Sequential(MoE(MultiGate(8, 4, gates=2), FFN(4, 8, 16))), torch.randn(2, 3, 8))
    torch.testing.assert_close(trace.layers["0"].weights.sum(1), torch.full((6,), 2.0))
