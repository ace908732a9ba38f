"""Padding of a decoder is not routed, though a batch tells it by its labels alone."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
)

from moeify.masks import of_labels
from moeify.record import observe, record
from moeify.sparsify import Recipe, sparsify
from moeify.train import SparseArguments, SparseTrainer
from moeify.train.decoder_mask import with_decoder_mask
from tiny_models import VOCABULARY, causal_lm

LENGTHS = (3, 8, 5, 2)
IDS = torch.randint(3, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, VOCABULARY, (4, 8)).where(torch.arange(8) < torch.tensor(LENGTHS)[:, None], -100)


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


def bart():
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=VOCABULARY, encoder_layers=1, decoder_layers=1, dropout=0.0, **sizes, **heads)
    return BartForConditionalGeneration(config)


@pytest.mark.parametrize("build", [t5, bart])
def test_a_trainer_routes_real_tokens_of_the_decoder_alone_and_the_loss_is_the_same(tmp_path, build):
    torch.manual_seed(0)
    model = sparsify(build(), Recipe(num_experts=4), verbose=False)
    with torch.no_grad():
        expected = model(input_ids=IDS, labels=LABELS).loss.item()
    rows = {}
    observe(model, lambda name, routing: rows.setdefault(name, int(routing.counts.sum())))
    data = [{"input_ids": ids, "labels": labels} for ids, labels in zip(IDS, LABELS, strict=True)]
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[], disable_tqdm=True, **settings)
    run = SparseTrainer(model, arguments, train_dataset=data, eval_dataset=data, sparse=SparseArguments())
    run.train()
    assert sorted(rows.values()) == [2 * sum(LENGTHS), 2 * IDS.numel()]
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("build", [t5, bart])
@pytest.mark.parametrize(
    "given", [{}, {"attention_mask": (torch.arange(6) < torch.tensor([[6], [2], [3], [4]])).int()}]
)
def test_a_plain_call_with_labels_routes_real_tokens_of_the_decoder_alone(build, given):
    model = sparsify(build(), Recipe(num_experts=4), verbose=False)
    with record(model) as decisions:
        loss = model(input_ids=IDS, labels=LABELS, **given).loss
    masked = {"decoder_attention_mask": LABELS.ne(-100).long()}
    with record(model) as expected:
        assert torch.equal(loss, model(input_ids=IDS, labels=LABELS, **given, **masked).loss)
    rows, wanted = ([int(d.counts.sum()) for d in each.values()] for each in (decisions, expected))
    assert rows == wanted == [2 * int(given.get("attention_mask", torch.ones(4, 6)).sum()), 2 * sum(LENGTHS)]


def test_only_what_lies_behind_the_last_label_is_padding():
    labels = torch.tensor([[-100, -100, 5, 6, -100], [1, 2, 3, 4, 5], [-100] * 5])
    assert of_labels(labels).tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]


def test_batches_of_other_models_and_masks_of_the_user_stay():
    batch = {"input_ids": IDS, "labels": LABELS}
    assert with_decoder_mask(causal_lm("llama"), batch) is batch
    mine = batch | {"decoder_attention_mask": torch.ones(4, 8)}
    assert with_decoder_mask(t5(), mine) is mine
    assert with_decoder_mask(t5(), {"input_ids": IDS}).keys() == {"input_ids"}
