"""A step that is not finite never reaches the weights, and its origin is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from moeify.sparsify import Recipe, sparsify
from moeify.train import SparseTrainer
from moeify.train.finite import find_nonfinite, is_finite
from tiny_models import VOCABULARY, causal_lm, mixtral


class Poison(TrainerCallback):
    """From step 3 on, a hook makes one gradient element NaN, or one activation infinite."""

    def __init__(self, kind):
        self.kind = kind

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
        if state.global_step == 2 and self.kind == "gradient":
            model.model.layers[1].self_attn.q_proj.weight.register_hook(_first_is_nan)
        if state.global_step == 2 and self.kind == "activation":
            model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda m, a, out: out / 0)


def _first_is_nan(gradient):
    gradient = gradient.clone()
    gradient.view(-1)[0] = float("nan")
    return gradient


def sparse_llama():
    return sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False)


@pytest.mark.parametrize("build", [sparse_llama, mixtral])
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize(
    ("kind", "where"), [("gradient", "gradient of model.layers.1.self_attn.q_proj.weight"), ("activation", "o_proj")]
)
def test_training_stops_before_the_optimizer_and_names_the_place(tmp_path, build, clip, kind, where):
    arguments = TrainingArguments(
        tmp_path, max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=clip,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    ids = torch.randint(3, VOCABULARY, (40, 8))
    poison, model = Poison(kind), build()
    run = SparseTrainer(
        model, arguments, train_dataset=[{"input_ids": r, "labels": r} for r in ids], callbacks=[poison]
    )
    with pytest.raises(FloatingPointError, match=rf"{where}.* is not finite in step 3"):
        run.train()
    assert all(torch.equal(p, poison.before[name]) for name, p in model.named_parameters())
    assert (tmp_path / "checkpoint-2" / "MANIFEST.json").is_file()


@pytest.mark.parametrize("earlier", [0, 2])
def test_a_halt_says_so_where_its_checkpoint_could_not_be_saved(tmp_path, monkeypatch, earlier):
    def full(trainer, folder):
        raise OSError(28, "No space left on device")

    arguments = TrainingArguments(tmp_path, max_steps=5, save_strategy="no", report_to=[], use_cpu=True)
    ids = torch.randint(3, VOCABULARY, (40, 8))
    run = SparseTrainer(
        sparse_llama(), arguments, train_dataset=[{"input_ids": r, "labels": r} for r in ids],
        callbacks=[Poison("gradient")],
    )  # fmt: skip
    monkeypatch.setattr(SparseTrainer, "_write", full)
    run.failures = earlier
    with pytest.raises(FloatingPointError, match="not touched the weights, which could not be saved"):
        run.train()
    assert not (tmp_path / "checkpoint-2").exists()


def test_a_loss_that_is_not_finite_by_itself_is_named_as_such():
    ids = torch.randint(3, VOCABULARY, (1, 1))  # nothing to predict: 0 / 0
    assert (
        find_nonfinite(sparse_llama(), [{"input_ids": ids, "labels": ids}])
        == "the output of the model as a whole, its loss"
    )


def test_losses_and_gradients_are_judged_together():
    layer = nn.Linear(2, 1)
    assert is_finite([torch.tensor(1.0)], layer)
    assert not is_finite([torch.tensor(1.0), torch.tensor(float("inf"))], layer)
    layer.weight.grad = torch.tensor([[1.0, float("nan")]])
    assert not is_finite([torch.tensor(1.0)], layer)
    assert is_finite([torch.tensor(1.0)], layer, gradients=False)


def test_the_first_culprit_is_named_weights_before_outputs_before_gradients():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight.grad = torch.full((2, 2), float("inf"))
    assert find_nonfinite(model, []) == "the gradient of 1.weight"
    with torch.no_grad():
        model[0].bias[0] = float("nan")
    assert find_nonfinite(model, []) == "the weights of 0.bias"
