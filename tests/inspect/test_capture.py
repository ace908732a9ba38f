"""A trace is captured from ours and from transformers' models: every token, every layer, no padding."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import moe_families as families
import tiny_models
from moeify import MoE, Recipe, record, sparsify
from moeify.capacity import dropped
from moeify.experts import FFN
from moeify.inspect.capture import capture
from moeify.inspect.trace import DECODE
from moeify.routers import Capacity, ExpertChoice, MultiGate, Phatgoose, Soft, Threshold, TopK


@pytest.fixture
def padded() -> dict[str, torch.Tensor]:
    """Two sequences of 5 and 8 tokens, the first padded on the left."""
    ids = torch.randint(3, 100, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def stacked(router, width: int = 8, experts: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(MoE(router(width, experts), FFN(experts, width, 16)) for _ in range(2)))
    for layer in model:
        if isinstance(getattr(layer.router, "weight", None), nn.Parameter):
            nn.init.normal_(layer.router.weight)
    return model


def sparse_llama(router) -> nn.Module:
    model = tiny_models.causal_lm("llama")
    return sparsify(model, Recipe(num_experts=4, router=router), verify=False)


def test_every_real_token_has_its_experts_of_every_layer(padded):
    model = tiny_models.mixtral()
    trace = capture(model, [padded])
    with torch.no_grad(), record(model) as decisions:
        model(**padded)
    assert list(trace.layers) == list(decisions)
    (tokens,) = trace.tables
    assert tokens.ids.tolist() == padded["input_ids"][padded["attention_mask"].bool()].tolist()
    assert tokens.sequence.tolist() == [0] * 5 + [1] * 8
    assert tokens.position.tolist() == [*range(5), *range(8)]
    for name, layer in trace.layers.items():
        assert torch.equal(layer.experts.long(), decisions[name].choices.indices)
        assert torch.equal(layer.weights, decisions[name].choices.weights)
        assert torch.equal(layer.scores, decisions[name].scores.half())
        assert torch.equal(layer.counts, decisions[name].counts)
        assert layer.dropped is None


def test_batches_are_numbered_and_domains_are_kept(padded):
    trace = capture(tiny_models.mixtral(), [padded | {"domain": ["code", "text"]}, padded | {"domain": "text"}])
    (tokens,) = trace.tables
    assert tokens.batch.tolist() == [0] * 13 + [1] * 13
    assert tokens.sequence.max() == 3
    assert [tokens.domains[i] for i in tokens.domain] == ["code"] * 5 + ["text"] * 21
    with pytest.raises(ValueError, match="a batch has 3 domains and a layer 16 tokens"):
        capture(tiny_models.mixtral(), [padded | {"domain": ["a", "b", "c"]}])


@pytest.mark.parametrize("build", [tiny_models.mixtral, partial(sparse_llama, TopK)], ids=["theirs", "ours"])
def test_what_is_written_is_routed_as_if_it_had_been_given(build, padded):
    model = build()
    ids = padded["input_ids"]
    trace = capture(model, [{"input_ids": ids}], generate=4)
    (tokens,) = trace.tables
    decoded = tokens.phase == DECODE
    assert int(decoded.sum()) == 2 * 4
    assert tokens.step[decoded].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert tokens.position[decoded].tolist() == [8, 8, 9, 9, 10, 10, 11, 11]
    whole = torch.cat([ids, tokens.ids[decoded].view(4, 2).T.long()], dim=1)
    again = capture(model, [{"input_ids": whole}])
    for name, layer in trace.layers.items():
        of_row = again.layers[name].experts.view(2, 12, -1)
        prompt, answer = of_row[:, :8].flatten(0, 1), of_row[:, 8:].transpose(0, 1).flatten(0, 1)
        assert torch.equal(layer.experts, torch.cat([prompt, answer]))


def test_nothing_is_kept_of_a_sequence_after_its_end(padded):
    model = tiny_models.mixtral()
    free = capture(model, [padded], generate=3)
    first = free.tables[0].ids[free.tables[0].step == 1]
    model.generation_config.eos_token_id = int(first[0])
    (tokens,) = capture(model, [padded], generate=3).tables
    assert tokens.sequence[tokens.phase == DECODE].tolist() == [1] * 3


def test_an_encoder_and_a_decoder_have_tables_of_their_own(padded):
    model = families.build("switch_transformers")
    batch = padded | {"decoder_input_ids": padded["input_ids"][:, :4]}
    trace = capture(model, [batch])
    encoder, decoder = trace.tables
    assert len(encoder) == 13
    assert decoder.ids.tolist() == batch["decoder_input_ids"].flatten().tolist()
    assert all((layer.tokens is encoder) == name.startswith("encoder") for name, layer in trace.layers.items())
    encoder, decoder = capture(model, [padded], generate=2).tables
    assert len(encoder) == 13
    assert decoder.sequence[decoder.phase == DECODE].tolist() == [0, 1, 0, 1]


def test_a_capacity_shows_what_it_dropped():
    model = stacked(lambda d, e: Capacity(TopK(d, e), factor=0.5, eval_factor=0.5))
    x = torch.randn(2, 12, 8)
    trace = capture(model, [x])
    with torch.no_grad(), record(model) as decisions:
        model.eval()(x)
    for name, layer in trace.layers.items():
        assert layer.dropped.float().mean().item() == pytest.approx(dropped(decisions[name])[0])
        assert torch.equal(layer.counts, decisions[name].counts)
        assert torch.equal(layer.assigned, decisions[name].assigned)


def test_a_capacity_shows_where_it_moved_rows():
    model = stacked(
        lambda d, e: Capacity(TopK(d, e, k=1, normalize=False), factor=1.0, eval_factor=1.0, overflow="next")
    )
    x = torch.randn(1, 12, 8)
    trace = capture(model, [x])
    with torch.no_grad(), record(model) as decisions:
        model.eval()(x)
    for name, layer in trace.layers.items():
        assert not torch.equal(layer.experts.long(), decisions[name].choices.indices)
        assert torch.equal(layer.counts, decisions[name].counts)


@pytest.mark.parametrize("router", [ExpertChoice, Threshold], ids=["expert choice", "threshold"])
def test_tokens_may_have_different_numbers_of_experts(router):
    model = stacked(router)
    x = torch.randn(2, 6, 8)
    trace = capture(model, [x])
    with torch.no_grad(), record(model) as decisions:
        model.eval()(x)
    for name, layer in trace.layers.items():
        assert torch.equal(layer.counts, decisions[name].counts)
        table = torch.zeros(12, 4)
        for k in range(layer.k):
            there = layer.experts[:, k] >= 0
            table[there, layer.experts[there, k].long()] += layer.weights[there, k]
        torch.testing.assert_close(table, decisions[name].weight_table())


def test_one_decision_per_sequence_is_that_of_each_of_its_tokens():
    trace = capture(stacked(partial(TopK, per="sequence")), [torch.randn(3, 5, 8)])
    for layer in trace:
        assert len(layer.experts.view(3, -1).unique(dim=1)) == 3
        assert torch.equal(layer.scores.view(3, 5, 4)[:, 0], layer.scores.view(3, 5, 4)[:, 4])


def test_slots_are_the_scores_of_a_layer_that_chooses_none():
    trace = capture(stacked(partial(Soft, slots=2)), [torch.randn(2, 5, 8)])
    for layer in trace:
        assert layer.k == 0
        torch.testing.assert_close(layer.scores.float().sum(-1), torch.ones(10), atol=2e-3, rtol=0)
        assert layer.tokens.sequence.tolist() == [0] * 5 + [1] * 5


@pytest.mark.parametrize("router", [partial(MultiGate, gates=2), Phatgoose], ids=["gates", "adapters"])
def test_weights_are_one_per_expert_whatever_the_router(router):
    trace = capture(stacked(router), [torch.randn(2, 5, 8)])
    assert all(layer.weights.shape == layer.experts.shape for layer in trace)


def test_scores_end_where_they_would_take_too_much(padded, capsys):
    model = tiny_models.mixtral()
    few = capture(model, [padded] * 3, most_bytes=100)
    assert "scores and logits take more than 0 MiB, so the trace has none" in capsys.readouterr().out
    assert all(layer.scores is None for layer in few)
    assert few == capture(model, [padded] * 3, scores=False)
    both = capture(model, [padded], logits=True).layers["model.layers.0.mlp"]
    torch.testing.assert_close(both.logits.float().softmax(-1), both.scores.float(), atol=2e-3, rtol=0)


def test_it_stops_after_the_batch_that_has_tokens_enough(padded):
    assert len(capture(tiny_models.mixtral(), [padded] * 5, tokens=14).tables[0]) == 26


def test_ids_have_their_text(padded):
    class Numbers:
        def decode(self, ids):
            return f"<{ids[0]}>"

    (tokens,) = capture(tiny_models.mixtral(), [padded], tokenizer=Numbers()).tables
    assert tokens.vocabulary == {i: f"<{i}>" for i in tokens.ids.tolist()}


def test_the_model_is_left_as_it_was(padded):
    model = tiny_models.mixtral().train()
    capture(model, [padded])
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_cannot_be_traced_is_refused(padded):
    with pytest.raises(ValueError, match="Linear has no sparse layer to trace"):
        capture(nn.Linear(2, 2), [torch.zeros(1, 2)])
    with pytest.raises(ValueError, match="there is no batch to trace"):
        capture(tiny_models.mixtral(), [])
    with pytest.raises(ValueError, match="a Sequential cannot generate"):
        capture(stacked(TopK), [torch.randn(1, 2, 8)], generate=2)
