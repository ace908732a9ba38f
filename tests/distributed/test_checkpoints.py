"""Saved on some ranks, resumed on others: the same tensors, the same training, and nothing less than all of it."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import threading
import time

import pytest
import torch
from torch import distributed as dist

from damage import damaged
from distributed.pool import RankFailed
from distributed.sharded_training import build, digest, train, whole
from killing import forks, killed_at_every_operation
from moeify.train import load_sharded, newest_checkpoint, save_sharded
from moeify.train.checkpoint.folder import MANIFEST, fault
from nights import nightly

STEPS, LAST = 20, 12


@pytest.fixture(scope="module", autouse=True)
def _read_once(ranks):
    ranks.preload("moeify.train")


def hop(rank, ranks, ep, before, after):
    """Case: what a checkpoint holds once it is loaded here, which is saved again."""
    model, optimizer = build(ranks, ep)
    if before is None:
        train(model, optimizer, 0, 3, rank, ranks)
    else:
        assert load_sharded(before, model, optimizer) == {"step": 3}
    save_sharded(after, model, optimizer, numbers={"step": 3})
    return digest(model, optimizer)


def test_every_tensor_is_the_same_on_however_many_ranks_it_is_saved_and_loaded(ranks, tmp_path):
    found, before = set(), None
    for i, (size, ep) in enumerate([(4, 2), (1, 1), (2, 2), (4, 4), (2, 1), (1, 1)]):
        after = tmp_path / f"checkpoint-{i}"
        found |= set(ranks(size, hop, ep, before, after) if size > 1 else [hop(0, 1, 1, before, after)])
        before = after
    assert len(found) == 1


def begun(rank, ranks, ep, folder):
    """Case: a training of which the middle is saved."""
    model, optimizer = build(ranks, ep)
    train(model, optimizer, 0, 5, rank, ranks)
    save_sharded(folder, model, optimizer)
    return train(model, optimizer, 5, 5 + STEPS, rank, ranks), digest(model, optimizer)


def resumed(rank, ranks, ep, folder):
    """Case: its other half."""
    model, optimizer = build(ranks, ep)
    load_sharded(folder, model, optimizer)
    return train(model, optimizer, 5, 5 + STEPS, rank, ranks), digest(model, optimizer)


def test_the_same_ranks_go_on_bit_for_bit_and_others_within_rounding(ranks, tmp_path):
    folder = tmp_path / "checkpoint-5"
    (losses, end), *_ = ranks(4, begun, 2, folder)
    assert ranks(4, resumed, 2, folder)[0] == (losses, end)
    for size, ep in [(1, 1), (2, 1), (2, 2), (4, 1)]:
        others, _ = ranks(size, resumed, ep, folder)[0] if size > 1 else resumed(0, 1, 1, folder)
        assert torch.tensor(others) == pytest.approx(torch.tensor(losses), abs=1e-5)
    assert losses[0] - losses[-1] > 0.05


def saved(rank, ranks, ep, folder, steps=1):
    """Case: checkpoints of some steps."""
    model, optimizer = build(ranks, ep)
    for step in range(steps):
        train(model, optimizer, step, step + 1, rank, ranks)
        save_sharded(folder / f"checkpoint-{step + 1}", model, optimizer, numbers={"step": step + 1})


@pytest.fixture(scope="module")
def good(ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    ranks(2, saved, 2, folder, 2)
    return folder


def test_damage_to_any_file_of_any_rank_is_seen_and_the_checkpoint_before_is_taken(good, capsys):
    seen = set()
    for name, what in damaged(good / "checkpoint-2", good / "checkpoint-1"):
        assert newest_checkpoint(good) == good / "checkpoint-1", (name, what)
        said = capsys.readouterr().out
        assert "rejected checkpoint-2: " in said, (name, what)
        assert name in said or name == MANIFEST, (name, what)
        seen.add(name)
    assert newest_checkpoint(good) == good / "checkpoint-2"
    assert sum("shard-0000" in name for name in seen) == 4
    assert len(seen) == 10


def _without(folder, name):
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"][name]
    (folder / name).unlink()
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_checkpoint_that_lacks_the_experts_of_a_rank_is_refused_by_their_names(good, tmp_path):
    folder = shutil.copytree(good / "checkpoint-2", tmp_path / "checkpoint-2")
    _without(folder, "model/shard-00002-model-00001-of-00001.safetensors")
    model, optimizer = build()
    before = digest(model, optimizer)
    with pytest.raises(ValueError, match=r"layers.0.experts.down\[2:4\], of experts 2 to 3, is in none of its files"):
        load_sharded(folder, model, optimizer)
    assert digest(model, optimizer) == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop("layers.0.bias"), "layers.0.bias is not in its manifest"),
        (lambda tensors: tensors.update(extra=[[2], "torch.float32"]), "extra is in none of its files"),
        (lambda tensors: tensors.update({"layers.0.bias": [[4], "torch.bfloat16"]}),
         "layers.0.bias is torch.float32 in its files and torch.bfloat16 in its manifest"),
        (lambda tensors: tensors.update({"layers.0.bias": [[3], "torch.float32"]}), "outside of its shape"),
        (lambda tensors: tensors.update({"layers.1.experts.up": [[4, 9, 8], "torch.float32"]}),
         r"layers.1.experts.up of shape \(4, 9, 8\) is not whole in its files"),
        (lambda tensors: tensors.clear(), "is not in its manifest"),
    ],
)  # fmt: skip
def test_the_manifest_and_the_headers_of_all_shards_say_the_same(good, tmp_path, change, reason):
    folder = shutil.copytree(good / "checkpoint-2", tmp_path / "checkpoint-2")
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest["tensors"]["model"])
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert re.search(reason, fault(folder))


def refused(rank, ranks, ep, folder):
    """Case: what a model that is not the one of a checkpoint is told, and whether it is as it was."""
    said = []
    for kind in ("name", "shape", "dtype", "frozen", "groups"):
        model, optimizer = build(ranks, ep, change=kind)
        before = digest(model, optimizer)
        try:
            load_sharded(folder, model, optimizer)
        except ValueError as error:
            said.append((str(error), digest(model, optimizer) == before))
    return said


@pytest.mark.parametrize("size", [1, 2])
def test_another_model_is_refused_before_anything_is_assigned(ranks, good, size):
    said = ranks(2, refused, 2, good / "checkpoint-2")[1] if size > 1 else refused(0, 1, 1, good / "checkpoint-2")
    assert [unchanged for _, unchanged in said] == [True] * 5
    name, shape, dtype, frozen, groups = (text for text, _ in said)
    assert "missing: more" in name
    assert "head.weight" in shape or "embedding.weight is (11, 8), the model needs (12, 8)" in shape
    assert "torch.float32" in dtype
    assert "the optimizer groups other parameters" in frozen
    assert "the optimizer groups other parameters" in groups


def read_by_torch(rank, ranks, ep, folder):
    """Case: whether the reader of torch.distributed.checkpoint gives the same tensors."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    model, _ = build(ranks, ep)
    load_sharded(folder, model)
    ours = {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}
    theirs = {name: torch.zeros_like(tensor) for name, tensor in ours.items()}
    dcp.load(theirs, storage_reader=HuggingFaceStorageReader(str(folder / "model")))
    return [name for name in ours if not torch.equal(whole(ours[name]), whole(theirs[name]))]


def test_torch_reads_the_shards_too(ranks, good):
    assert ranks(2, read_by_torch, 1, good / "checkpoint-2") == [[], []]


def unshared(rank, ranks, folder):
    """Case: what is said of experts that every rank holds for itself, and of buffers that differ."""
    said = []
    for name in ("experts.up", "bias"):
        model, optimizer = build()
        with torch.no_grad():
            model.get_parameter("layers.1." + name).add_(rank) if "experts" in name else model.layers[1].bias.add_(rank)
        try:
            save_sharded(folder / "checkpoint-1", model, optimizer)
            said.append(load_sharded(folder / "checkpoint-1", model) and model.layers[1].bias.tolist())
        except ValueError as error:
            said.append(str(error))
    return said, model.layers[1].bias.tolist()


def test_experts_that_each_rank_holds_for_itself_are_not_lost_without_a_word(ranks, tmp_path):
    for (said, _), bias in ranks(2, unshared, tmp_path):
        assert said.startswith("layers.1.experts.up differ between processes and are not sharded")
        assert bias == [0, 0, 0, 0]


def unwritable(rank, ranks, ep, folder):
    """Case: what all ranks hear of the third save of one that may write no files of some size, and of the fourth."""
    import resource

    saved(rank, ranks, ep, folder, 2)
    model, optimizer = build(ranks, ep)
    train(model, optimizer, 0, 3, rank, ranks)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        save_sharded(folder / "checkpoint-3", model, optimizer)
    except OSError as error:
        said = str(error)
    dist.barrier()
    left = sorted(path.name for path in folder.iterdir())
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    save_sharded(folder / "checkpoint-4", model, optimizer)
    return said, left


def test_a_rank_that_cannot_write_is_an_error_on_all_and_the_checkpoint_before_stays(ranks, tmp_path):
    for said, left in ranks(2, unwritable, 2, tmp_path):
        assert re.search(r"^rank 1: .*File too large", said)
        assert left == ["checkpoint-1", "checkpoint-2"]
    assert newest_checkpoint(tmp_path).name == "checkpoint-4"


def test_a_disk_without_room_is_said_with_the_bytes_that_are_needed(tmp_path, monkeypatch):
    model, optimizer = build()
    train(model, optimizer, 0, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(OSError, match=r"\d,\d{3} bytes are needed and 1,000 are free"):
        save_sharded(tmp_path / "checkpoint-1", model, optimizer)
    assert not list(tmp_path.iterdir())


def in_the_background(rank, ranks, ep, folder):
    """Case: whether what is saved is what was there at the call, though training goes on meanwhile."""
    model, optimizer = build(ranks, ep)
    train(model, optimizer, 0, 2, rank, ranks)
    at_call, pending = [], []
    for step in (2, 3, 4):
        at_call.append(digest(model, optimizer))
        pending.append(save_sharded(folder / f"checkpoint-{step}", model, optimizer, background=True))
        done = [each.done() for each in pending[:-1]]
        train(model, optimizer, step, step + 1, rank, ranks)
    assert all(done)
    pending[-1].result()
    found = []
    for step in (2, 3, 4):
        model, optimizer = build(ranks, ep)
        load_sharded(folder / f"checkpoint-{step}", model, optimizer)
        found.append(digest(model, optimizer))
    return found == at_call, len(set(found))


@pytest.mark.parametrize("size", [1, 4])
def test_a_save_in_the_background_holds_what_was_there_at_the_call(ranks, size, tmp_path):
    answers = ranks(size, in_the_background, 2, tmp_path) if size > 1 else [in_the_background(0, 1, 1, tmp_path)]
    assert answers == [(True, 3)] * size


def failing_in_the_background(rank, ranks, folder):
    """Case: what the future of a save in the background holds that a rank could not write."""
    import resource

    model, optimizer = build(ranks)
    train(model, optimizer, 0, 1, rank, ranks)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    error = save_sharded(folder / "checkpoint-1", model, optimizer, background=True).exception()
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    dist.barrier()
    return type(error).__name__, str(error), list(folder.iterdir())


def test_a_save_in_the_background_that_fails_is_told_and_leaves_nothing(ranks, tmp_path):
    for kind, said, left in ranks(2, failing_in_the_background, tmp_path):
        assert (kind, left) == ("OSError", [])
        assert said.startswith("rank 1: ")


def killed(rank, ranks, ep, folder, who, after, background):
    """Case: a training that goes on from where it is and saves each step; one rank is killed after some seconds."""
    if rank == who:
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    newest = newest_checkpoint(folder)
    model, optimizer = build(ranks, ep)
    step = 0 if newest is None else load_sharded(newest, model, optimizer)["step"]
    losses = {}
    while step < LAST:
        losses[step] = train(model, optimizer, step, step + 1, rank, ranks)
        step += 1
        name, numbers = folder / f"checkpoint-{step}", {"step": step}
        saving = save_sharded(name, model, optimizer, numbers=numbers, background=background, keep=2)
    if who is not None:
        time.sleep(60)
    saving.result()
    return losses, digest(model, optimizer)


@pytest.mark.parametrize(("background", "killed_ranks"), [(False, [0, 1]), (True, [1]), nightly(True, [0, 1] * 5)])
def test_ranks_killed_at_any_moment_go_on_bit_for_bit(ranks, tmp_path, background, killed_ranks):
    losses, end = ranks(2, killed, 2, tmp_path / "whole", None, 0, False)[0]
    for who in killed_ranks:
        with pytest.raises(RankFailed, match=f"rank {who} of 2: the process died"):
            ranks(2, killed, 2, tmp_path / "killed", who, random.SystemRandom().uniform(0.05, 0.6), background)
    again, last = ranks(2, killed, 2, tmp_path / "killed", None, 0, background)[0]
    assert last == end
    assert again == {step: losses[step] for step in again}
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == [
        f"checkpoint-{step}" for step in (LAST - 1, LAST)
    ]


def replace(folder):
    model, optimizer = build()
    train(model, optimizer, 0, 1)
    save_sharded(folder / "checkpoint-1", model, optimizer, numbers={"new": True})


@forks
@pytest.mark.parametrize("step", [3, nightly(1)])
def test_a_kill_at_any_file_operation_leaves_the_old_checkpoint_or_the_new_one(tmp_path, step):
    model, optimizer = build()
    save_sharded(tmp_path / "start" / "checkpoint-1", model, optimizer, numbers={"new": False})
    seen = set()
    for output, done in killed_at_every_operation(replace, tmp_path / "start", tmp_path, step):
        newest = newest_checkpoint(output)
        new = load_sharded(newest, model, optimizer)["new"]
        assert bool(optimizer.state) == new
        assert [path.name for path in output.iterdir()] == ["checkpoint-1"]
        assert new or not done
        seen.add(new)
        model, optimizer = build()
    assert seen == {True, False}
