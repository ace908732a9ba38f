"""Loss and expert load by position, compared with what is computed by hand."""

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from moeify import Recipe, record, sparsify
from moeify.data import Packed
from moeify.evaluate.positions import by_position
from moeify.sparsify import fresh


def llama(sparse: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes)).eval()
    return sparsify(model, Recipe(num_experts=4, experts=fresh), verbose=False) if sparse else model


def test_loss_and_load_are_those_of_the_positions_in_the_documents():
    model, rows = llama(sparse=True), Packed([torch.randint(32, (5,)), torch.randint(32, (9,))], 7)
    early, late = by_position(model, rows, [0, 3], chunk=4)
    nats, experts = [[], []], [torch.zeros(4), torch.zeros(4)]
    for row in rows:
        inputs = {name: row[name][None] for name in ("input_ids", "position_ids")}
        with torch.no_grad(), record(model) as decisions:
            logits = model(**inputs, use_cache=False).logits[0]
        (routing,) = decisions.values()
        for token, position in enumerate(row["position_ids"].tolist()):
            which = int(position >= 3)
            experts[which] += routing.reads()[token]
            if token + 1 < 7 and row["labels"][token + 1] != -100:
                nats[which].append(F.cross_entropy(logits[token], row["input_ids"][token + 1]))
    for found, losses, load in zip((early, late), nats, experts, strict=True):
        (rows_of_layer,) = found.rows.values()
        assert rows_of_layer.tolist() == load.tolist()
        assert found.tokens == len(losses)
        assert found.loss == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
        whole = experts[0] + experts[1]
        away = (load / load.sum() - whole / whole.sum()).abs().sum() / 2
        assert next(iter(found.elsewhere.values())) == pytest.approx(float(away), rel=1e-5)
        assert next(iter(found.max_violation.values())) == pytest.approx(float(load.max() / load.mean() - 1), rel=1e-5)
    assert (early.first, early.last, late.first, late.last) == (0, 2, 3, 6)


def test_a_dense_model_has_losses_only_and_positions_that_do_not_occur_have_none():
    near, far = by_position(llama(sparse=False), Packed([torch.randint(32, (6,))], 6), [0, 50])
    assert near.tokens == 5
    assert near.rows == near.max_violation == {}
    assert far.tokens == 0
    assert far.loss != far.loss


@pytest.mark.parametrize(
    "edges", [[], [1, 2], [0, 4, 2], [0, 0], [0, float("nan")], [0, 2.5], torch.tensor([0.0, 4.0])]
)
def test_edges_that_do_not_rise_from_0_are_refused(edges):
    with pytest.raises(ValueError, match="rise from 0"):
        by_position(llama(sparse=False), Packed([torch.randint(32, (6,))], 6), edges)


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="no sample"):
        by_position(llama(sparse=False), [], [0])
