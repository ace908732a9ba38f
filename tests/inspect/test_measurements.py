"""Measurements on models: what experts see, how alike they are, outliers, and what masking one does."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import tiny_models
from inspect_routes import trace_of
from moe_families import build, inputs
from moeify import MoE, Recipe, sparsify
from moeify.experts import FFN, Blocks, Identity
from moeify.inspect import report
from moeify.inspect.measurements.effect import Measure
from moeify.inspect.measurements.layer_inputs import experts_of, layer_inputs, parameters_of
from moeify.inspect.measurements.masking import Effects, Masked, chosen_experts, masked_effects, without_expert
from moeify.inspect.measurements.outliers import expert_outputs
from moeify.inspect.measurements.pairwise import pairwise_similarity
from moeify.inspect.panels.causal import causal, rank_correlation
from moeify.inspect.panels.over_training import over_training
from moeify.inspect.panels.panel import NotMeasured
from moeify.inspect.panels.patches import patches
from moeify.inspect.panels.saturation import saturation
from moeify.inspect.panels.similarity import similarity
from moeify.inspect.panels.super_experts import super_experts
from moeify.layers import sparse_layers
from moeify.routers import Soft, TopK
from moeify.sparsify import copies


def mixtral(**settings):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_local_experts": 4, "initializer_range": 0.3,
    }  # fmt: skip
    return MixtralForCausalLM(MixtralConfig(**sizes | settings))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return mixtral()


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(40, (3, 12), generator=generator), "domain": name} for name in ("a", "b")]


def test_layer_inputs_gives_back_the_output_of_the_layer(model, batches):
    outputs = []
    block = model.model.layers[1].mlp
    handle = block.register_forward_hook(lambda module, args, output: outputs.append(output))
    seen = layer_inputs(model, batches[:1])[next(reversed(sparse_layers(model)))]
    handle.remove()
    (x, routing) = seen.passes[0]
    again = routing.combine(experts_of(seen.layer)(routing.dispatch(x), routing.counts))
    torch.testing.assert_close(again.flatten(), outputs[0].flatten(), rtol=1e-4, atol=1e-5)


def test_copies_of_one_expert_are_alike_and_others_are_not():
    router = TopK(8, 4)
    moe = nn.Sequential(MoE(router, FFN(4, 8, 16)))
    before = similarity(pairwise_similarity(layer_inputs(moe, [torch.randn(2, 9, 8)])))
    for p in moe[0].experts.parameters():
        p.data[:] = p.data[:1].clone()
    after = similarity(pairwise_similarity(layer_inputs(moe, [torch.randn(2, 9, 8)])))
    assert before.advice.level == "fine"
    assert after.advice.level == "act"
    assert after.table.rows[0][1:] == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("family", ["dbrx", "nllb-moe", "llama4_text"])
def test_weights_of_families_that_hold_them_otherwise_are_told_apart(family):
    model = build(family)
    name, layer = next(iter(sparse_layers(model).items()))
    matrix = pairwise_similarity(layer_inputs(model, [inputs(model)]))[name].weights
    assert matrix.shape == (8, 8)
    assert matrix.diagonal() == pytest.approx(1, abs=1e-4)
    assert matrix[~torch.eye(8, dtype=torch.bool)].abs().max() < 0.9
    with without_expert(layer, 3):
        assert not any(part.any() for part in parameters_of(layer, 3))
        assert any(part.any() for part in parameters_of(layer, 2))


def test_an_expert_with_outliers_is_a_super_expert():
    moe = nn.Sequential(*(MoE(TopK(8, 8), FFN(8, 8, 16)) for _ in range(3)))
    x = [torch.randn(4, 32, 8)]
    assert super_experts(expert_outputs(layer_inputs(moe, x))).advice.level == "fine"
    list(moe[1].experts.parameters())[-1].data[5] *= 1e5
    panel = super_experts(expert_outputs(layer_inputs(moe, x)))
    assert panel.advice.level == "act"
    assert "5 in 1" in panel.advice.finding


def test_outputs_of_zero_do_not_count_among_their_median():
    moe = nn.Sequential(MoE(TopK(8, 4, k=4), FFN(4, 8, 16)))
    x = [torch.randn(4, 32, 8)]
    whole = expert_outputs(layer_inputs(moe, x))["0"]
    list(moe[0].experts.parameters())[-1].data[:, :6] = 0  # six of the eight values of an output
    assert expert_outputs(layer_inputs(moe, x))["0"].median == pytest.approx(whole.median, rel=0.5)


def test_one_similar_pair_among_different_experts_is_named():
    moe = nn.Sequential(MoE(TopK(8, 4), FFN(4, 8, 16)))
    for p in moe[0].experts.parameters():
        p.data[3] = p.data[1]
    panel = similarity(pairwise_similarity(layer_inputs(moe, [torch.randn(2, 9, 8)])))
    assert panel.advice.level == "look"
    assert "The most similar are 1 and 3 in 0, 1.00." in panel.advice.finding


def test_experts_that_return_their_tokens_are_neither_super_experts_nor_copies():
    moe = nn.Sequential(MoE(TopK(8, 4, k=4), Blocks([FFN(2, 8, 16), Identity(2)])))
    seen = layer_inputs(moe, [1e6 * torch.randn(4, 32, 8)])
    assert expert_outputs(seen)["0"].peak.isnan().tolist() == [False, False, True, True]
    like = pairwise_similarity(seen)["0"].outputs
    assert like.isnan().sum() == 12
    assert like[0, 1].abs() < 0.9


def test_masking_an_expert_is_undone_and_one_without_tokens_changes_nothing(model, batches):
    before = {name: p.clone() for name, p in model.named_parameters()}
    name, layer = next(iter(sparse_layers(model).items()))
    with without_expert(layer, 2):
        assert all(not p[2].any() for p in layer.weights.values())
        assert all(p[1].any() for p in layer.weights.values())
    found = masked_effects(model, batches, [(name, e, 1.0) for e in range(4)])
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    assert len(found.whole) == 6
    assert any(bool(f.rise.abs().max() > 1e-4) for f in found.masked)


def test_the_masked_loss_is_that_of_the_model_without_the_expert(model, batches):
    name, layer = next(iter(sparse_layers(model).items()))
    ids = batches[0]["input_ids"]
    found = masked_effects(model, batches[:1], [(name, 1, 1.0)])
    assert float(found.whole.mean()) == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)
    with without_expert(layer, 1):
        without = float((found.whole + found.masked[0].rise).mean())
        assert without == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)


FOUR = Recipe(num_experts=4, experts=partial(copies, noise=0.5))


@pytest.mark.parametrize(
    ("make", "each"),
    [(tiny_models.whisper, "sequences"), (tiny_models.bert, "sequences"), (tiny_models.vit, "samples")],
)
def test_with_labels_the_loss_that_masking_raises_is_the_models_own(make, each):
    model = sparsify(make(), FOUR, verbose=False).eval()
    batch = tiny_models.inputs(model, batch=6)
    found = masked_effects(model, [batch], [(next(iter(sparse_layers(model))), 0, 1.0)])
    assert (found.measure.each, len(found.whole)) == (each, 6)
    assert float(found.whole.mean()) == pytest.approx(model(**batch).loss.item(), rel=1e-4)


@pytest.mark.parametrize("make", [tiny_models.bert, tiny_models.vit, tiny_models.clip])
def test_without_labels_masking_is_measured_by_the_change_of_the_outputs(make):
    model = sparsify(make(), FOUR, verbose=False).eval()
    batch = {name: value for name, value in tiny_models.inputs(model, batch=6).items() if name != "labels"}
    name, layer = next(iter(sparse_layers(model).items()))
    found = masked_effects(model, [batch], [(name, 0, 1.0)])
    y = model(**batch)[0].flatten(1)
    with without_expert(layer, 0):
        changed = (model(**batch)[0].flatten(1) - y).norm(dim=1) / y.norm(dim=1)
    assert found.measure.name == "change of the outputs"
    torch.testing.assert_close(found.masked[0].rise, changed.detach(), rtol=1e-4, atol=1e-6)


def test_a_contrastive_loss_is_one_of_its_batch():
    model = sparsify(tiny_models.clip(), FOUR, verbose=False).eval()
    batches = [tiny_models.inputs(model, batch=4, seed=s) | {"return_loss": True} for s in range(3)]
    found = masked_effects(model, batches, [(next(iter(sparse_layers(model))), 0, 1.0)])
    assert found.measure.each == "batches"
    assert found.whole.tolist() == pytest.approx([model(**batch).loss.item() for batch in batches], rel=1e-5)


def test_a_model_that_returns_no_numbers_to_compare_has_no_causal_score():
    moe = MoE(TopK(8, 4), FFN(4, 8, 16))
    with pytest.raises(ValueError, match="no tensor of numbers"):
        masked_effects(Only(moe), [torch.randn(2, 3, 8)], [("moe", 0, 1.0)])


class Only(nn.Module):
    def __init__(self, moe):
        super().__init__()
        self.moe = moe

    def forward(self, x):
        return {"class": self.moe(x).sum(-1).argmax(-1)}


def effects(whole: float, *rises: list[float], chance: float = 5.0) -> Effects:
    measure = Measure(of=lambda number, output: output, unit="nats per token", each="sequences", chance=chance)
    masked = [Masked("0", i, 1.0 + i, torch.tensor(rise)) for i, rise in enumerate(rises)]
    return Effects(measure, torch.full((len(rises[0]),), whole), masked)


def test_the_advice_tells_harmless_experts_from_needed_and_from_unclear_ones():
    none, some, wild = [0.0] * 8, [0.1] * 8, [-1.0, 1.0] * 4
    assert causal(effects(1.0, none, none, some), 3).advice.level == "look"
    assert causal(effects(1.0, none, some, some), 3).advice.level == "fine"
    assert "redundancy" in causal(effects(1.0, none, none, none), 3).advice.action
    assert "too wide" in causal(effects(1.0, wild, wild, some), 3).advice.action
    assert "guesses" in causal(effects(5.2, some, some, some), 3).advice.finding
    assert "too wide" in causal(effects(1.0, *[[0.1]] * 3), 3).advice.action
    even = effects(1.0, none, some, some)
    assert (
        "all loads are equal"
        in causal(replace(even, masked=[replace(m, load=1.0) for m in even.masked]), 3).advice.finding
    )


def test_experts_to_mask_are_of_large_and_small_load():
    trace = trace_of([[0]] * 6 + [[1]] * 3 + [[2]] * 1)
    assert [expert for _, expert, _ in chosen_experts(trace, most=2)] == [0, 3]
    assert chosen_experts(trace, most=2)[0][2] == pytest.approx(2.4)


def test_ranks_correlate_as_spearman_has_it():
    assert rank_correlation(torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 15])) == pytest.approx(0.5)
    assert rank_correlation(torch.tensor([1.0, 1, 3]), torch.tensor([5.0, 5, 9])) == pytest.approx(1)


def test_saturation_is_the_share_of_the_last_choices_that_were_made_before():
    panel = saturation({1: trace_of([[0, 1], [2, 3]]), 5: trace_of([[0, 2], [2, 3]]), 9: trace_of([[0, 2], [2, 3]])})
    assert panel.table.rows == [(1, 0.75, 0.75, 0.25), (5, 1.0, 1.0, 0.0)]
    with pytest.raises(NotMeasured, match="two steps"):
        saturation({1: trace_of([[0]])})
    with pytest.raises(ValueError, match="trace the same text"):
        saturation({1: trace_of([[0]]), 2: trace_of([[0], [0]])})


def test_a_log_of_training_whose_balance_gets_worse_asks_for_a_controller():
    log = [{"step": s, "layers": {"a": {"max_vio": 0.1 * s}, "b": {"max_vio": 0.3 * s}}} for s in range(1, 11)]
    panel = over_training(log)
    assert panel.advice.level == "act"
    assert panel.table.rows[0] == (1, 0.2)
    assert over_training(log[::-1]).advice.level == "fine"


def test_a_report_of_a_model_has_the_panels_that_need_weights(model, batches, tmp_path):
    made = report(model, batches, checkpoints={1: mixtral(), 2: model}, file=tmp_path / "page.html")
    titles = {panel.title for panel in made.panels}
    assert {"Similarity of experts", "Super experts", "Causal score", "Saturation and drift"} <= titles
    assert "Specialisation by domain" in titles
    with pytest.raises(ValueError, match="only on data"):
        report(model)


def test_a_soft_moe_shows_its_slots_and_its_patches():
    model = nn.Sequential(MoE(Soft(8, 4, slots=2), FFN(4, 8, 16)))
    made = report(model, [torch.randn(3, 16, 8)])
    panels = {panel.title: panel for panel in made.panels}
    assert math.isclose(sum(panels["Slots of Soft MoE"].picture.charts[0].values[0].tolist()), 4, rel_tol=1e-3)
    assert any("no layer sends tokens" in reason for reason in made.missing)


def test_patches_are_the_tokens_behind_the_class_token():
    trace = trace_of([[3], [0], [1], [2], [1]], sequence=torch.zeros(5, dtype=torch.long))
    panel = patches(trace, [torch.rand(3, 8, 8)])
    assert panel.picture.charts["1"].experts.flatten().tolist() == [0, 1, 2, 1]
    with pytest.raises(NotMeasured, match="no square"):
        patches(trace_of([[0]] * 3, sequence=torch.zeros(3, dtype=torch.long)), [torch.rand(3, 8, 8)])
