"""Saved on some ranks, resumed on others: the same tensors, the same training, and nothing less than all of it."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from damage import damaged
from distributed.sharded_training import build, digest, train
from moeify.train import load_sharded, newest_checkpoint, save_sharded
from moeify.train.checkpoint.folder import MANIFEST, fault

STEPS = 20


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
