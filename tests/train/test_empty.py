"""Micro-batches of padding alone, or of one token, add nothing to a loss and end no run."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from moeify.sparsify import Recipe, sparsify
from moeify.train import SparseArguments, SparseTrainer
from tiny_models import VOCABULARY, causal_lm

IDS = torch.randint(3, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in IDS]
EMPTY = {
    "all padding": {"input_ids": IDS[0], "attention_mask": torch.zeros_like(IDS[0]), "labels": IDS[0]},
    "without a label to predict": {name: value[:1] for name, value in ROWS[0].items()},
    "all padding, and says so in its labels": {
        "input_ids": IDS[0], "attention_mask": torch.zeros_like(IDS[0]), "labels": torch.full_like(IDS[0], -100)
    },
}  # fmt: skip


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))


def train(folder, rows, sparse, kind=SparseTrainer, **arguments):
    torch.manual_seed(0)
    model, seen = sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False), Gradients()
    settings = {
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0.0,
    } | arguments  # fmt: skip
    run = kind(
        model, TrainingArguments(folder, **settings), train_dataset=rows, eval_dataset=rows, sparse=sparse,
        callbacks=[seen],
    )  # fmt: skip
    run.train()
    return run, seen.steps


class Means(SparseTrainer):
    """Whose loss is a mean over the labels of a micro-batch, 0 / 0 where there is none."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


@pytest.mark.parametrize("kind", [SparseTrainer, Means])
@pytest.mark.parametrize("what", EMPTY)
def test_a_step_without_anything_to_learn_has_loss_and_gradients_of_zero(tmp_path, capsys, what, kind):
    run, steps = train(tmp_path, [*ROWS, EMPTY[what]], SparseArguments(balance=0.0), kind, max_steps=8)
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert [loss == 0 for loss in losses] == [not step.any() for step in steps]
    assert sum(loss == 0 for loss in losses) == 2
    assert all(torch.isfinite(step).all() for step in steps)
    assert math.isfinite(run.evaluate()["eval_loss"])
    said = capsys.readouterr().out
    assert said.count(f"is {what.partition(',')[0]}; it, and all that are, count with a loss of 0") == 2


def test_a_micro_batch_of_padding_changes_no_gradient_balance_included(tmp_path):
    sparse = SparseArguments(balance=1.0, z=0.1)
    _, [alone] = train(tmp_path, ROWS[:1], sparse, max_steps=1)
    rows = [ROWS[0], EMPTY["all padding, and says so in its labels"]]
    _, [together] = train(tmp_path, rows, sparse, max_steps=1, gradient_accumulation_steps=2)
    torch.testing.assert_close(together, alone)
