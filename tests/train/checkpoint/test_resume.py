"""Kill it anywhere: the run goes on from a checkpoint that can be trusted, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import MixtralForCausalLM, TrainingArguments

from damage import damaged, flip
from moeify.balance import Sign
from moeify.files import fingerprint
from moeify.folders import RUN_LOCK, locked
from moeify.origin import Origin
from moeify.routers.topk import TopK
from moeify.schedule import linear
from moeify.sparsify import Recipe, sparsify
from moeify.store import load
from moeify.train import SparseArguments, SparseTrainer
from moeify.train.checkpoint.folder import MANIFEST, fault, newest, recover, rotate, writing
from moeify.train.checkpoint.state import load_optimizer, save_optimizer, write_json
from tiny_models import VOCABULARY, causal_lm, mixtral

STEPS = 8


def llama():
    torch.manual_seed(0)
    recipe = Recipe(num_experts=4, router=partial(TopK, selection_bias=True, jitter=0.1))
    return sparsify(causal_lm("llama", attention_dropout=0.1), recipe, verbose=False)


def trainer(folder, model, **arguments):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (20, 8), generator=generator)  # 8 steps are 1.6 epochs
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 1,
        "logging_steps": 1, "save_total_limit": 3, "learning_rate": 1e-2, "report_to": [], "use_cpu": True,
        "disable_tqdm": True,
    } | arguments  # fmt: skip
    ours = Origin.of(model).recipe is not None
    sparse = SparseArguments(
        balance=linear(0.1, 0.01, STEPS), controller=Sign(0.01) if ours else None, dropout=0.2 if ours else None
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    return SparseTrainer(model, TrainingArguments(folder, **settings), train_dataset=data, sparse=sparse)


def history(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss_hex"], row["grad_norm_hex"]) for row in rows]


def run(folder, model, resume=None, **arguments):
    trained = trainer(folder, model, **arguments)
    trained.train(resume_from_checkpoint=resume)
    return trained


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("build", [llama, mixtral])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, build):
    whole = run(tmp_path / "whole", build())
    stopped = run(tmp_path / "parts", build(), save_total_limit=None)
    for step in range(4, STEPS + 1):
        shutil.rmtree(tmp_path / "parts" / f"checkpoint-{step}")
    again = run(tmp_path / "parts", build(), resume=True)
    assert history(tmp_path / "parts") == history(tmp_path / "whole")
    assert len(history(tmp_path / "whole")) == STEPS
    assert same_weights(whole.model, again.model)
    assert same_weights(whole.model, stopped.model)
    for kept in ("optimizer.json", "optimizer.safetensors"):
        one, other = (tmp_path / each / f"checkpoint-{STEPS}" / kept for each in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes()


def work(output):
    begun = any(fault(path) is None for path in output.glob("checkpoint-*"))
    run(output, llama(), resume=begun or None)


def test_a_run_killed_at_random_steps_goes_on_bit_for_bit(tmp_path):
    run(tmp_path / "whole", llama())
    random.seed(time.time_ns())
    fork = multiprocessing.get_context("fork")  # a fresh interpreter would take longer to import than to train
    for at in sorted(random.sample(range(2, STEPS - 1), 3)):
        worker = fork.Process(target=work, args=(tmp_path / "killed",))
        worker.start()
        log = tmp_path / "killed" / "metrics.jsonl"
        while worker.is_alive() and not (log.exists() and log.read_text().count("\n") >= at):
            time.sleep(random.uniform(0.0, 0.02))
        worker.kill()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
    run(tmp_path / "killed", llama(), resume=True)
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("*.tmp"))


def test_an_error_inside_a_step_saves_nothing_and_the_run_goes_on_from_the_checkpoint_before(tmp_path):
    whole = run(tmp_path / "whole", llama())
    crashing = trainer(tmp_path / "run", llama(), save_steps=4)

    def fail(module, args):
        if crashing.state.global_step == 6 and module.training:
            raise torch.OutOfMemoryError("no memory left")

    crashing.model.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        crashing.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]
    again = run(tmp_path / "run", llama(), resume=True, save_steps=4)
    assert same_weights(again.model, whole.model)


def test_a_checkpoint_of_either_kind_of_model_also_loads_by_itself(tmp_path):
    ids = torch.randint(3, VOCABULARY, (1, 8))
    for build, read in [(llama, load), (mixtral, MixtralForCausalLM.from_pretrained)]:
        folder = tmp_path / build.__name__
        model = run(folder, build(), max_steps=1).model.eval()
        assert torch.equal(read(folder / "checkpoint-1").eval()(ids).logits, model(ids).logits)


def test_the_best_model_comes_back_with_its_experts(tmp_path):
    trained = trainer(tmp_path, mixtral(), learning_rate=1e-1, max_steps=3, save_total_limit=None)
    trained.train()
    last = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    trained.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trained._load_best_model()
    assert all(not torch.equal(last[name], t) for name, t in trained.model.state_dict().items() if "experts" in name)


def test_no_pickle_is_written(tmp_path):
    run(tmp_path, llama(), max_steps=1)
    kinds = {path.suffix for path in (tmp_path / "checkpoint-1").iterdir()}
    assert kinds == {".json", ".safetensors", ".py", ".md"}


def _flip(path):
    flip(path, path.read_bytes(), b"")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    run(folder, llama(), max_steps=2)
    return folder


def test_damage_to_any_file_is_seen_and_the_checkpoint_before_is_taken(good, capsys):
    assert newest(good) == good / "checkpoint-2"
    for name, what in damaged(good / "checkpoint-2", good / "checkpoint-1"):
        assert newest(good) == good / "checkpoint-1", (name, what)
        said = capsys.readouterr().out
        assert "rejected checkpoint-2: " in said, (name, what)
        assert name in said or name == MANIFEST, (name, what)
    assert newest(good) == good / "checkpoint-2"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(format=2), "has the format 2, and this version of moeify reads format 1"),
        (lambda m: m.pop("format"), "has the format None"),
        (lambda m: m.update(files=[]), "reads format 1"),
        (lambda m: m["files"].pop("optimizer.safetensors"), "its manifest lacks optimizer.safetensors"),
        (lambda m: m["files"].pop("trainer_state.json"), "its manifest lacks trainer_state.json"),
        (lambda m: m["files"].pop("model.safetensors"), "its manifest lacks the weights"),
        (lambda m: [m["files"].pop(name) for name in list(m["files"]) if name[0] in "bos"],
         "balance.safetensors is not in its manifest"),
        (lambda m: m["files"].update({"a\0b": {}}), "cannot be read"),
        (lambda m: m["files"].update({"config.json": 3}), "cannot be read"),
    ],
)  # fmt: skip
def test_a_manifest_that_does_not_say_everything_is_not_believed(good, change, reason, capsys):
    path = good / "checkpoint-2" / MANIFEST
    content = path.read_text()
    manifest = json.loads(content)
    change(manifest)
    path.write_text(json.dumps(manifest))
    try:
        assert newest(good) == good / "checkpoint-1"
    finally:
        path.write_text(content)
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), PermissionError(13, "denied"), MemoryError()])
def test_a_device_that_fails_is_a_reason_to_take_the_checkpoint_before(good, error, monkeypatch, capsys):
    def failing(path):
        if path.parent.name == "checkpoint-2":
            raise error
        return fingerprint(path)

    monkeypatch.setattr("moeify.train.checkpoint.folder.fingerprint", failing)
    assert newest(good) == good / "checkpoint-1"
    assert f"rejected checkpoint-2: it cannot be read ({type(error).__name__}" in capsys.readouterr().out


def test_what_cannot_be_read_after_a_kill_is_not_deleted(good, tmp_path, monkeypatch, capsys):
    shutil.copytree(good / "checkpoint-2", tmp_path / "checkpoint-2.trash")

    def failing(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr("moeify.train.checkpoint.folder.fingerprint", failing)
        recover(tmp_path)
    assert "left" in capsys.readouterr().out
    recover(tmp_path)
    assert fault(tmp_path / "checkpoint-2") is None


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    with locked(tmp_path, RUN_LOCK, ""), pytest.raises(OSError, match=r"another process is training in .*name another"):
        run(tmp_path, llama(), max_steps=1)
    assert not list(tmp_path.iterdir())


def test_a_stale_shard_an_empty_folder_and_a_path_outside_are_rejected(good, tmp_path):
    folder = shutil.copytree(good / "checkpoint-2", tmp_path / "checkpoint-2")
    (folder / "model-00002.safetensors").touch()
    assert fault(folder) == "model-00002.safetensors is not in its manifest"
    (tmp_path / "checkpoint-3").mkdir()
    assert "never finished" in fault(tmp_path / "checkpoint-3")
    manifest = json.loads((folder / MANIFEST).read_text())
    outside = manifest | {"files": {"../checkpoint-2/config.json": {}} | manifest["files"]}
    (tmp_path / "checkpoint-3" / "MANIFEST.json").write_text(json.dumps(outside))
    assert fault(tmp_path / "checkpoint-3") == "its manifest names ../checkpoint-2/config.json, which lies outside"


def test_without_a_good_checkpoint_nothing_is_started(tmp_path, good):
    with pytest.raises(FileNotFoundError, match="it holds none; to start afresh"):
        run(tmp_path, llama(), resume=True)
    broken = shutil.copytree(good / "checkpoint-2", tmp_path / "checkpoint-2")
    _flip(broken / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"can be trusted \(checkpoint-2: model.safetensors has sha256"):
        run(tmp_path, llama(), resume=True)
    with pytest.raises(FileNotFoundError, match=r"cannot go on from .*checkpoint-2: model.safetensors"):
        run(tmp_path, llama(), resume=str(broken))


def test_a_checkpoint_of_another_model_is_refused(good):
    with pytest.raises(ValueError, match="not those of this MixtralForCausalLM"):
        run(good, mixtral(), resume=str(good / "checkpoint-2"))


def test_a_run_that_freezes_other_parameters_is_refused_before_anything_is_assigned(good):
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="groups other parameters than the checkpoint"):
        run(good, model, resume=str(good / "checkpoint-2"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_optimizer_that_groups_other_parameters_is_refused(tmp_path):
    model = torch.nn.Linear(2, 1)
    save_optimizer(torch.optim.AdamW(model.parameters()), model, tmp_path)
    with pytest.raises(ValueError, match="groups other parameters"):
        load_optimizer(torch.optim.AdamW([model.weight]), model, tmp_path)


def test_what_is_neither_tensor_nor_number_is_not_saved(tmp_path):
    write_json(tmp_path / "a.json", {"lr": torch.tensor(0.5)})
    assert json.loads((tmp_path / "a.json").read_text()) == {"lr": 0.5}
    with pytest.raises(TypeError, match=r"cannot save a object in a.json: .* pickle is never written"):
        write_json(tmp_path / "a.json", {"lr": object()})


def test_a_run_that_starts_afresh_in_a_used_folder_says_so_and_saves_its_own(good, tmp_path, capsys):
    folder = shutil.copytree(good, tmp_path / "used")
    before = (folder / "checkpoint-2" / "model.safetensors").read_bytes()
    run(folder, llama(), max_steps=2, learning_rate=1e-1)
    assert "holds checkpoints of an earlier run up to checkpoint-2" in capsys.readouterr().out
    assert (folder / "checkpoint-2" / "model.safetensors").read_bytes() != before
    earlier = folder / "earlier-1"
    assert {path.name for path in earlier.iterdir()} == {"checkpoint-1", "checkpoint-2", "metrics.jsonl"}
    assert (earlier / "checkpoint-2" / "model.safetensors").read_bytes() == before
    assert fault(earlier / "checkpoint-2") is None


def test_a_fresh_run_keeps_its_checkpoints_beside_those_of_later_steps_and_goes_on_from_them(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "used")
    run(folder, llama(), max_steps=1, save_total_limit=1)
    assert newest(folder).name == "checkpoint-1"
    again = run(folder, llama(), max_steps=2, save_total_limit=1, resume=True)
    assert again.state.global_step == 2
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert {path.name for path in folder.glob("earlier-*/checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def test_a_run_that_goes_on_from_the_middle_moves_later_checkpoints_aside(good, tmp_path):
    folder = shutil.copytree(good, tmp_path / "used")
    run(folder, llama(), max_steps=2, save_total_limit=1, resume=str(folder / "checkpoint-1"))
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (folder / "earlier-1" / "checkpoint-2" / "MANIFEST.json").is_file()
    assert [step for step, *_ in history(folder)] == [1, 2]


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 1}])
def test_a_finished_run_takes_no_further_step_however_often_it_is_resumed(tmp_path, length):
    whole = run(tmp_path, llama(), **length)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for _ in range(2):
        again = run(tmp_path, llama(), resume=True, **length)
        assert again.state.global_step == whole.state.global_step
        assert same_weights(whole.model, again.model)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert newest(tmp_path).name == f"checkpoint-{whole.state.global_step}"


def test_a_finished_run_that_is_given_more_steps_goes_on(tmp_path):
    run(tmp_path, llama(), max_steps=2)
    assert run(tmp_path, llama(), max_steps=4, resume=True).state.global_step == 4


def test_a_checkpoint_of_the_model_only_says_what_begins_anew(tmp_path, capsys):
    run(tmp_path, llama(), max_steps=1, save_only_model=True)
    run(tmp_path, llama(), max_steps=2, resume=True)
    assert "checkpoint-1 holds the model only (save_only_model)" in capsys.readouterr().out


def test_a_failed_save_leaves_nothing_behind_and_training_goes_on(tmp_path, monkeypatch, capsys):
    trained, calls = trainer(tmp_path, llama(), max_steps=4), []
    write = trained._write

    def full(folder):
        calls.append(folder)
        write(folder)
        if len(calls) in (2, 3):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(trained, "_write", full)
    trained.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    assert capsys.readouterr().out.count("earlier checkpoints are untouched") == 2


def test_three_failed_saves_in_a_row_end_the_run(tmp_path, monkeypatch):
    trained = trainer(tmp_path, llama())

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trained, "_write", full)
    with pytest.raises(OSError, match="three times in a row"):
        trained.train()
    assert trained.state.global_step == 3


def test_a_checkpoint_is_complete_or_absent(tmp_path):
    def fail():
        with writing(tmp_path / "checkpoint-1") as folder:
            (folder / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list(tmp_path.iterdir())


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    written = [tmp_path / f"checkpoint-{step}" for step in range(1, 6)]
    for checkpoint in written:
        with writing(checkpoint) as folder:
            (folder / "state").write_text(checkpoint.name)
    rotate(written, 2, str(tmp_path / "checkpoint-2"))
    assert [path.name for path in written] == ["checkpoint-2", "checkpoint-5"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-5"]
