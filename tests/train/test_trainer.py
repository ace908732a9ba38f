"""The trainer keeps the balance loss on, reports it, and refuses settings that would silently switch it off."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

from moeify.balance import Quantile, Sign
from moeify.routers import Frozen, TopK
from moeify.sparsify import Recipe, sparsify
from moeify.store import load
from moeify.train import SparseArguments, SparseTrainer, SparseTrainerMixin
from tiny_models import VOCABULARY, causal_lm, deepseek_v3, mixtral


def llama(**router):
    torch.manual_seed(0)
    recipe = Recipe(num_experts=4, router=partial(TopK, **router))
    return sparsify(causal_lm("llama"), recipe, verbose=False)


def data(rows=64, length=12):
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model, folder, sparse=None, *, kind=SparseTrainer, callbacks=None, **arguments):
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"}
    settings = defaults | {"report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3} | arguments
    return kind(model, TrainingArguments(folder, **settings), train_dataset=data(), sparse=sparse, callbacks=callbacks)


def test_balance_is_on_unless_it_is_turned_off_and_the_first_line_says_so(tmp_path, capsys):
    trainer(llama(), tmp_path).train()
    assert "moeify: balance: balance loss (weight 0.01, global scope)\n" in capsys.readouterr().out
    trainer(llama(), tmp_path, SparseArguments(balance=0.0)).train()
    assert "moeify: balance: none, no loss and no controller\n" in capsys.readouterr().out


def test_a_strong_balance_loss_evens_out_a_lopsided_router(tmp_path):
    def entropy(balance):
        model = llama(bias=True)
        with torch.no_grad():
            for name, bias in model.named_parameters():
                if "router.bias" in name:
                    bias[0] += 2.0
        run = trainer(model, tmp_path, SparseArguments(balance=balance), max_steps=40, learning_rate=1e-2)
        run.train()
        return run.state.log_history[-2]["load_entropy"]

    assert entropy(1.0) > entropy(0.0) + 0.05


def test_the_logged_loss_is_that_of_the_task_alone(tmp_path):
    logs = []
    for balance in (0.0, 10.0):
        run = trainer(llama(), tmp_path, SparseArguments(balance=balance), max_steps=1)
        run.train()
        logs.append(run.state.log_history[0]["loss"])
    assert logs[0] == pytest.approx(logs[1], abs=1e-5)


def test_every_layer_is_measured_and_written_with_the_bits_of_loss_and_gradient(tmp_path):
    run = trainer(llama(), tmp_path)
    run.train()
    last = run.state.log_history[-2]
    assert {"balance", "load_entropy", "max_vio", "dead_experts", "router_entropy", "drop_rate"} <= last.keys()
    assert {"load_entropy_worst", "worst_layer", "tokens_per_second"} <= last.keys()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert float.fromhex(line["loss_hex"]) == line["loss"]
        assert list(line["layers"]) == ["model.layers.0.mlp", "model.layers.1.mlp"]
        assert all(0 <= layer["load_entropy"] <= 1 + 1e-6 for layer in line["layers"].values())


def test_a_controller_moves_the_biases_of_our_models_and_of_native_ones(tmp_path):
    for model in (llama(selection_bias=True), deepseek_v3()):
        trainer(model, tmp_path, SparseArguments(balance=0.0, controller=Sign(0.01)), max_steps=1).train()
        biases = [b for name, b in model.named_buffers() if name.endswith(("selection_bias", "correction_bias"))]
        assert biases
        assert all(b.abs().max() > 0 for b in biases)


def test_the_mixin_stands_in_front_of_a_trainer_with_a_loss_of_its_own(tmp_path):
    class Halved(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return (loss / 2, outputs) if return_outputs else loss / 2

    class SparseHalved(SparseTrainerMixin, Halved):
        pass

    losses = []
    for kind in (SparseTrainer, SparseHalved):
        run = trainer(llama(), tmp_path, kind=kind, max_steps=1)
        run.train()
        losses.append(run.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(2 * losses[1], rel=1e-4)


def test_the_balance_loss_of_a_native_model_is_replaced_not_doubled(tmp_path, capsys):
    model = mixtral(output_router_logits=True)
    trainer(model, tmp_path).train()
    assert not model.config.output_router_logits
    assert "the model's own balance loss is turned off" in capsys.readouterr().out


def test_a_trainer_that_asks_the_model_for_its_balance_loss_asks_no_more(tmp_path, capsys):
    class Asking(transformers.Trainer):  # as those of TRL do
        aux_loss_enabled = True

        def compute_loss(self, model, inputs, *args, **kwargs):
            assert not self.aux_loss_enabled
            return super().compute_loss(model, inputs, *args, **kwargs)

    class SparseAsking(SparseTrainerMixin, Asking):
        pass

    trainer(mixtral(), tmp_path, kind=SparseAsking).train()
    assert "the model's own balance loss is turned off" in capsys.readouterr().out


def test_a_dense_model_is_refused_unless_balance_is_off(tmp_path):
    with pytest.raises(ValueError, match="is dense, there is nothing to balance"):
        trainer(causal_lm("llama"), tmp_path).train()
    trainer(causal_lm("llama"), tmp_path, SparseArguments(balance=0.0)).train()


def test_a_balance_loss_that_cannot_act_is_an_error_not_a_silence(tmp_path):
    model = sparsify(causal_lm("llama"), Recipe(num_experts=4, router=Frozen), verbose=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="have no gradient: the routers and all layers before them are frozen"):
        trainer(model, tmp_path).train()

    scoreless = llama()
    for module in scoreless.modules():
        if isinstance(module, TopK):
            module.register_forward_hook(lambda m, a, r: replace(r, evidence=replace(r.evidence, scores=None)))
    with pytest.raises(ValueError, match="so it is not wired"):
        trainer(scoreless, tmp_path).train()


def test_reentrant_checkpointing_is_refused_however_it_was_turned_on(tmp_path):
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant=False"):
        trainer(llama(), tmp_path, **options).train()
    model = llama()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="decided without gradients"):
        trainer(model, tmp_path).train()


CONTROLLED = [(partial(llama, selection_bias=True), Quantile()), (mixtral, None), (deepseek_v3, Sign())]


@pytest.mark.parametrize(("build", "controller"), CONTROLLED)
def test_checkpointing_changes_neither_losses_nor_counts(tmp_path, build, controller):
    logs = []
    for on in (False, True):
        sparse = SparseArguments(z=1e-3, controller=controller)
        run = trainer(build(), tmp_path / str(on), sparse, activation_checkpointing=on)
        run.train()
        logs.append([(e["loss"], e["load_entropy"]) for e in run.state.log_history[:-1]])
    assert torch.allclose(torch.tensor(logs[0]), torch.tensor(logs[1]), rtol=1e-5)


def test_a_finished_model_is_saved_so_that_it_loads(tmp_path):
    run = trainer(llama(), tmp_path)
    run.train()
    run.save_model(tmp_path / "final")
    again, ids = load(tmp_path / "final"), torch.randint(3, VOCABULARY, (1, 8))
    assert torch.equal(again(ids).logits, run.model.eval()(ids).logits)
    assert not list((tmp_path / "final").glob("*.bin"))


class Sender(TrainerCallback):
    """Sends a signal in step 2."""

    def __init__(self, number):
        self.number = number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            signal.raise_signal(self.number)


def test_a_stop_on_a_full_disk_does_not_say_that_it_was_saved(tmp_path, capsys, monkeypatch):
    def full(trainer, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SparseTrainer, "_write", full)
    trainer(llama(), tmp_path, callbacks=[Sender(signal.SIGTERM)]).train()
    assert "after step 2 of 4, which could not be saved: earlier checkpoints are kept" in capsys.readouterr().out


NAMES = ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"]


@pytest.mark.parametrize("number", [getattr(signal, name) for name in NAMES if hasattr(signal, name)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(tmp_path, capsys, number):
    before = signal.getsignal(number)
    run = trainer(llama(), tmp_path, callbacks=[Sender(number)])
    run.train()
    assert run.state.global_step == 2
    assert (tmp_path / "checkpoint-2" / "MANIFEST.json").is_file()
    assert f"stopped by {signal.Signals(number).name} after step 2 of 4" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    again = trainer(llama(), tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
