"""`RoutingCallback` in trainers that know nothing of experts: what it counts, and who is told."""

from __future__ import annotations

import importlib
import json
import multiprocessing
from functools import partial
from typing import ClassVar

import pytest
import tokenizers
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from moeify.sparsify import Recipe, sparsify
from moeify.train import RoutingCallback, SparseArguments, SparseTrainer
from moeify.train.routing_callback import _call_first
from ranks import on_ranks, routed
from tiny_models import VOCABULARY, causal_lm, mixtral

LENGTHS = (12, 7, 3, 9, 12, 1, 5, 8) * 2


def llama():
    torch.manual_seed(0)
    return sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False)


def data():
    generator, rows = torch.Generator().manual_seed(0), []
    for length in LENGTHS:
        ids = torch.randint(3, VOCABULARY, (12,), generator=generator)
        mask = (torch.arange(12) < length).long()
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)})
    return rows


def train(model, folder, *callbacks, kind=transformers.Trainer, **arguments):
    settings = {
        "max_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "train_sampling_strategy": "sequential",
    } | arguments  # fmt: skip
    run = kind(
        model, TrainingArguments(folder, **settings), train_dataset=data(), eval_dataset=data()[:3],
        callbacks=list(callbacks),
    )  # fmt: skip
    run.train()
    return run


def steps(run):
    return [entry for entry in run.state.log_history if "loss" in entry]


def rows(folder):
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [[layer["rows"] for layer in entry["layers"].values()] for entry in entries]


@pytest.mark.parametrize("build", [llama, mixtral])
def test_any_trainer_logs_the_figures_of_the_sparse_trainer(tmp_path, build):
    kind = partial(SparseTrainer, sparse=SparseArguments(balance=0))
    sparse = train(build(), tmp_path / "sparse", kind=kind, gradient_accumulation_steps=2)
    plain = train(build(), tmp_path / "plain", RoutingCallback(), gradient_accumulation_steps=2)
    assert len(steps(plain)) == 2
    for one, other in zip(steps(sparse), steps(plain), strict=True):
        assert one.keys() == other.keys()
        assert {name: one[name] for name in one if "tokens_per_second" not in name} == pytest.approx(
            {name: other[name] for name in one if "tokens_per_second" not in name}
        )
        assert len(other.keys() - {"loss", "grad_norm", "learning_rate", "epoch", "step"}) <= RoutingCallback.max_keys
    assert rows(tmp_path / "sparse") == rows(tmp_path / "plain")


def test_padding_evaluation_and_repeated_passes_do_not_count(tmp_path):
    real = sum(LENGTHS[:8])
    for name, arguments in {
        "plain": {},
        "repeated": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        "re-entrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        "evaluated": {"eval_strategy": "steps", "eval_steps": 1},
    }.items():
        train(mixtral(), tmp_path / name, RoutingCallback(), learning_rate=0.0, **arguments)
        assert [[sum(layer) for layer in entry] for entry in rows(tmp_path / name)] == [[2 * real] * 2] * 2
        assert rows(tmp_path / name) == rows(tmp_path / "plain")


def test_a_global_batch_is_the_same_in_one_micro_batch_and_in_eight(tmp_path):
    whole, cut = (
        steps(
            train(
                mixtral(), tmp_path / str(parts), RoutingCallback(),
                per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts,
            )
        )[0]
        for parts in (1, 8)
    )  # fmt: skip
    for figure in ("max_vio", "load_entropy", "load_cv", "dead_experts", "balance", "router_entropy"):
        assert whole[figure] == pytest.approx(cut[figure], rel=1e-4)
    assert whole["max_vio_micro"] == pytest.approx(whole["max_vio"])
    assert cut["max_vio_micro"] > cut["max_vio"] + 0.1


@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="ranks are forked off a server")
def test_the_loads_of_two_ranks_add_up(tmp_path):
    one, (first, second) = routed(0, 1, tmp_path / "1"), on_ranks(2, routed, tmp_path / "2")
    assert first["max_vio_micro"] == second["max_vio_micro"] > one["max_vio_micro"]
    assert first["max_vio"] == pytest.approx(one["max_vio"], rel=1e-4)
    assert first["load_entropy"] == pytest.approx(one["load_entropy"], rel=1e-4)
    assert rows(tmp_path / "1") == rows(tmp_path / "2")


class Reporter(TrainerCallback):
    seen: ClassVar[list] = []

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.seen.append(dict(logs))


def test_what_report_to_names_is_told_all_that_the_log_has(tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "reporter", Reporter)
    monkeypatch.setattr(Reporter, "seen", [])
    run = train(mixtral(), tmp_path, RoutingCallback(), report_to=["reporter"])
    assert [{name: entry[name] for name in entry if name != "step"} for entry in steps(run)] == Reporter.seen
    assert "max_vio_micro" in Reporter.seen[-1]


def test_beside_the_sparse_trainer_it_adds_nothing(tmp_path):
    train(mixtral(), tmp_path, RoutingCallback(), kind=SparseTrainer)
    assert len(rows(tmp_path)) == 2


def test_a_dense_model_and_a_loop_without_reporters_are_said(tmp_path, capsys):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no sparse layer"):
        train(causal_lm("llama"), tmp_path, RoutingCallback())
    _call_first(RoutingCallback())
    assert "no trainer of transformers calls RoutingCallback" in capsys.readouterr().out


def test_layers_that_are_called_past_their_model_are_told_of(tmp_path, capsys):
    class Inner(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model.model(inputs["input_ids"]).last_hidden_state.square().mean()

    train(mixtral(), tmp_path, RoutingCallback(), kind=Inner)
    assert capsys.readouterr().out.count("without the model around it, so padding among its tokens counts") == 1
    assert [[sum(layer) for layer in entry] for entry in rows(tmp_path)] == [[2 * 8 * 12] * 2] * 2


def test_tensorboard_holds_what_the_log_holds(tmp_path):
    pytest.importorskip("tensorboard")
    accumulator = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    run = train(mixtral(), tmp_path, RoutingCallback(), report_to=["tensorboard"])
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    found = accumulator.EventAccumulator(str(events))
    found.Reload()
    for entry in steps(run):
        for name in entry.keys() - {"step"}:
            values = {event.step: event.value for event in found.Scalars(f"train/{name}")}
            assert values[entry["step"]] == pytest.approx(entry[name], rel=1e-5)


def test_wandb_is_told_what_the_log_holds(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = train(mixtral(), tmp_path / "run", RoutingCallback(), report_to=["wandb"])
    told = dict(wandb.run.summary)
    wandb.finish()
    last = steps(run)[-1]
    assert {f"train/{name}": last[name] for name in last if name != "step"}.items() <= told.items()


def test_trackio_is_told_what_the_log_holds(tmp_path, monkeypatch):
    trackio = pytest.importorskip("trackio")
    told = []
    real = trackio.log
    monkeypatch.setattr(trackio, "log", lambda metrics, *args, **kwargs: told.append(metrics) or real(metrics))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    run = train(mixtral(), tmp_path / "run", RoutingCallback(), report_to=["trackio"], project="moeify")
    for entry in steps(run):
        assert any(
            {f"train/{name}": entry[name] for name in entry if name != "step"}.items() <= t.items() for t in told
        )


def test_trl_trains_with_it(tmp_path):
    trl = pytest.importorskip("trl")
    settings = trl.SFTConfig(
        tmp_path, max_steps=2, per_device_train_batch_size=8, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="1"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2")
    texts = pytest.importorskip("datasets").Dataset.from_list(
        [{"input_ids": row["input_ids"].tolist()[:length]} for row, length in zip(data(), LENGTHS, strict=True)]
    )
    run = trl.SFTTrainer(
        mixtral(), settings, train_dataset=texts, processing_class=tokenizer, callbacks=[RoutingCallback()]
    )
    run.train()
    assert [[sum(layer) for layer in entry] for entry in rows(tmp_path)] == [[2 * sum(LENGTHS[:8])] * 2] * 2
    assert steps(run)[-1]["max_vio"] > 0
