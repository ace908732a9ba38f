"""What happens beside the steps, and what is measured while they run."""

from __future__ import annotations

import io
import json
import math
import re
import signal
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import TrainerCallback, TrainingArguments

from moeify.capacity import limit
from moeify.experts import FFN
from moeify.notices import notify
from moeify.routers import Frozen, Lookup
from moeify.routing import Evidence, assign
from moeify.schedule import constant, linear
from moeify.sparsify import Recipe, sparsify
from moeify.train import ExpertDropout, KSchedule, ProgressLine, SaveOnSignal, SparseArguments, SparseTrainer, run_log
from moeify.train.metrics import MAX_KEYS, Tally, summarize
from moeify.train.run_log import append, exact, forget_after
from tiny_models import VOCABULARY, causal_lm, mixtral


def llama():
    torch.manual_seed(0)
    return sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False)


def train(model, folder, *callbacks, sparse=None):
    ids = torch.randint(3, VOCABULARY, (16, 8))
    arguments = TrainingArguments(
        folder, max_steps=4, per_device_train_batch_size=2, logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    SparseTrainer(model, arguments, train_dataset=data, callbacks=list(callbacks), sparse=sparse).train()


class Seen(TrainerCallback):
    def __init__(self, look):
        self.look, self.values = look, []

    def on_substep_end(self, args, state, control, **kwargs):
        self.values.append(self.look(kwargs["model"]))

    on_pre_optimizer_step = on_substep_end


def test_expert_dropout_follows_its_schedule(tmp_path):
    seen = Seen(lambda model: {m.dropout.p for m in model.modules() if isinstance(m, FFN)})
    train(llama(), tmp_path, seen, sparse=SparseArguments(dropout=linear(0.4, 0.0, 4)))
    assert [pytest.approx(p) for p in (0.4, 0.3, 0.2, 0.1)] == [p for (p,) in seen.values]


def test_expert_dropout_without_experts_of_ours_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="MixtralForCausalLM has no experts of moeify"):
        train(mixtral(), tmp_path, ExpertDropout(0.1))


def test_k_follows_its_schedule_up_to_all_experts(tmp_path):
    model = sparsify(causal_lm("llama"), Recipe(num_experts=4, router=partial(Frozen, k=1)), verbose=False)
    seen = Seen(lambda model: {m.k for m in model.modules() if isinstance(m, Frozen)})
    train(model, tmp_path, seen, KSchedule(linear(1, 4, 3)))
    assert seen.values == [{1}, {2}, {3}, {4}]


def test_a_k_that_cannot_be_set_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="wants k=5 at step 0, and a router has 4 experts"):
        train(llama(), tmp_path, KSchedule(constant(5)))
    with pytest.raises(ValueError, match="MixtralForCausalLM has no router with a k to set"):
        train(mixtral(), tmp_path, KSchedule(constant(1)))
    of_its_method = sparsify(causal_lm("llama"), Recipe(num_experts=4, router=Lookup), verbose=False)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no router with a k to set"):
        train(of_its_method, tmp_path, KSchedule(constant(1)))


def test_a_scheduled_balance_weight_reaches_the_gradient(tmp_path):
    def gradients(balance):
        seen = Seen(lambda model: model.get_parameter("model.layers.0.mlp.router.weight").grad.norm().item())
        train(llama(), tmp_path, seen, sparse=SparseArguments(balance=balance))
        return seen.values

    off, late = gradients(0.0), gradients(lambda step: 10.0 * (step == 3))
    assert off[:3] == pytest.approx(late[:3], rel=1e-4)
    assert off[3] != pytest.approx(late[3], rel=1e-2)


def test_the_line_of_progress_is_one_in_a_terminal(tmp_path):
    screen = io.StringIO()
    train(llama(), tmp_path, ProgressLine(Console(file=screen, force_terminal=True, width=160)))
    assert "tokens/s" in screen.getvalue()
    assert "balance" in screen.getvalue()


def test_elsewhere_a_few_plain_lines_tell_the_progress(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ProgressLine, "lines", 2)
    train(llama(), tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("moeify: ")]
    assert len(lines) == 2
    for step, line in zip((2, 4), lines, strict=True):
        rest = "" if step == 4 else r"  \d+ s left"
        assert re.fullmatch(rf"step {step}/4  loss [\d.]+  balance [\d.]+  dead \d+  [\d,]+ tokens/s{rest}", line)


index = st.lists(st.permutations(range(4)).map(lambda p: p[:2]), min_size=1, max_size=30)


@given(index)
def test_load_metrics_are_those_of_their_definitions(choices):
    tokens, tally = torch.tensor(choices), Tally()
    scores = torch.full((len(choices), 4), 0.25)
    for part in tokens.split(7):
        gates = torch.full(part.shape, 0.5)
        routing = assign(part, gates, 4, evidence=Evidence(scores=scores[: len(part)], logits=scores[: len(part)]))
        tally.add([("layer", routing)])
    tally.end_step()
    (layer,) = tally.drain().values()
    f = [choices_of / tokens.numel() for choices_of in tokens.flatten().bincount(minlength=4).tolist()]
    assert layer["load_entropy"] == pytest.approx(-sum(p * math.log(p) for p in f if p) / math.log(4), abs=1e-5)
    assert layer["max_vio"] == pytest.approx(4 * max(f) - 1, abs=1e-5)
    micro = [part.flatten().bincount(minlength=4) / part.numel() for part in tokens.split(7)]
    violations = [4 * part.max().item() - 1 for part in micro]
    assert layer["max_vio_micro"] == pytest.approx(sum(violations) / len(violations), abs=1e-5)
    assert layer["load_cv"] == pytest.approx(math.sqrt(sum((4 * share - 1) ** 2 for share in f) / 4), abs=1e-5)
    assert layer["effective_experts"] == pytest.approx(4 ** (layer["load_entropy"] - 1), abs=1e-5)
    assert layer["rows"] == tokens.flatten().bincount(minlength=4).tolist()
    assert layer["dead_experts"] == sum(p == 0 for p in f)
    assert layer["router_entropy"] == pytest.approx(1, abs=1e-5)
    assert layer["balance"] == pytest.approx(1, abs=1e-5)
    assert layer["drop_rate"] == pytest.approx(0, abs=1e-6)
    assert tally.drain() == {}


def test_dropped_rows_are_counted_against_what_was_asked():
    routing = limit(assign(torch.zeros(8, 1, dtype=torch.long), torch.ones(8, 1), 2), 2)
    tally = Tally()
    tally.add([("layer", routing)])
    tally.end_step()
    (layer,) = tally.drain().values()
    assert layer["drop_rate"] == pytest.approx(0.75)
    assert layer["dead_experts"] == 1
    assert "balance" not in layer


def one_expert_each(*experts):
    return assign(torch.tensor(experts)[:, None], torch.ones(len(experts), 1), 2)


def test_the_global_batch_of_a_step_is_even_where_its_micro_batches_are_not():
    tally = Tally()
    tally.begin({"called": 2, "idle": 2})
    for _ in range(2):
        for expert in (0, 1):
            tally.add([("called", one_expert_each(expert, expert))])
        tally.end_step()
    ((name, layer),) = tally.drain().items()
    assert (name, layer["max_vio"], layer["max_vio_micro"], layer["rows"]) == ("called", 0, 1, [4, 4])


def test_violations_are_of_steps_and_not_of_all_that_a_log_entry_covers():
    tally = Tally()
    for expert in (0, 1):
        tally.add([("layer", one_expert_each(expert, expert))])
        tally.end_step()
    tally.add([("layer", one_expert_each(0, 0))], counts=False)  # a step of padding
    tally.end_step()
    (layer,) = tally.drain().values()
    assert (layer["max_vio"], layer["max_vio_micro"], layer["load_cv"], layer["dead_experts"]) == (1, 1, 0, 0)


def test_a_summary_holds_the_means_and_points_at_the_worst_layer():
    layers = {
        "a": {"load_entropy": 0.9, "max_vio": 0.2, "max_vio_micro": 0.3, "dead_experts": 0.0, "drop_rate": 0.0},
        "b": {"load_entropy": 0.5, "max_vio": 1.0, "max_vio_micro": 1.0, "dead_experts": 2.0, "drop_rate": 0.1},
    }
    found = summarize(layers)
    assert found["load_entropy"] == pytest.approx(0.7)
    assert (found["load_entropy_worst"], found["max_vio_worst"], found["worst_layer"]) == (0.5, 1.0, 1.0)
    assert summarize({}) == {}


def test_a_summary_has_no_more_keys_for_more_layers_and_experts():
    tally = Tally()
    for layer in range(30):
        scores = torch.rand(5, 64)
        evidence = Evidence(logits=scores, scores=scores)
        tally.add([(str(layer), assign(scores.topk(2).indices, torch.ones(5, 2), 64, evidence=evidence))])
    tally.end_step()
    assert len(summarize(tally.drain())) == MAX_KEYS


def test_a_full_disk_costs_a_line_of_metrics_and_not_the_run(tmp_path, capsys):
    resource = pytest.importorskip("resource")
    log = tmp_path / "metrics.jsonl"
    append(log, {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 5, before[1]))  # room for a part of a line
    try:
        append(log, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the metrics of step 2 could not be written" in capsys.readouterr().out
    append(log, {"step": 3})
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 3]


@pytest.mark.parametrize("end", [b'{"step": 2, "lo', b"\xff\xfe\n", b"[1]\n", b'{"step": 4}', b""])
def test_a_log_forgets_the_steps_that_are_done_again_and_damaged_lines(tmp_path, monkeypatch, end):
    log = tmp_path / "metrics.jsonl"
    for step in range(1, 5):
        append(log, exact({"step": step, "loss": 1 / step}))
    log.write_bytes(log.read_bytes() + end)
    monkeypatch.setattr(run_log, "write_text", None)  # a full disk takes no second file
    forget_after(log, 2)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1]["loss_hex"] == (0.5).hex()


def test_what_cannot_be_taken_out_of_a_log_is_said_and_kept(tmp_path, monkeypatch, capsys):
    def full(file, text):
        raise OSError(28, "No space left on device")

    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 3}\n{"step": 1}\n')
    monkeypatch.setattr(run_log, "write_text", full)
    forget_after(log, 2)
    assert "metrics after step 2 could not be taken out" in capsys.readouterr().out
    assert len(log.read_text().splitlines()) == 2


def test_a_line_that_no_one_can_print_ends_nothing(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stdout", Full())
    notify("the run goes on")


def test_an_ignored_signal_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        stopper = SaveOnSignal()
        stopper.on_train_begin(None, None, None)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == stopper._receive
        stopper.restore()
    finally:
        signal.signal(signal.SIGTERM, before)
