"""`SparseTrainer` saves a model that is sharded over ranks, and goes on from it on as many ranks or on others."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from distributed.trained import BUILD, _forget_accelerate, whole
from moeify.balance import Sign
from moeify.parallel import distribute
from moeify.store import load
from moeify.train import SparseArguments
from nights import nightly
from ranks import llama, train

SAVED = 3


@pytest.fixture(scope="module", autouse=True)
def _read_once(ranks):
    ranks.preload("moeify.train", "transformers.models.llama.modeling_llama")


def trained(rank, ranks, folder, name, sizes, last, resume=None, background=False, **arguments):
    """Case: the bits of loss and gradient norm of each step, and all weights, selection biases included."""
    _forget_accelerate()
    sparse = SparseArguments(
        balance=0.1, z=0.01, controller=Sign(0.01) if name == "llama" else None, background_save=background
    )
    settings = {
        "max_steps": last, "per_device_train_batch_size": 8 // ranks, "gradient_accumulation_steps": 1,
        "save_steps": SAVED, "save_strategy": "steps", "learning_rate": 1e-3, "max_grad_norm": 1.0, "data_size": 96,
    } | arguments  # fmt: skip
    made = train(folder, lambda: distribute(BUILD[name](), sizes), 1, resume=resume, sparse=sparse, **settings)
    weights = {key: whole(value) for key, value in made.model.state_dict().items()}
    return history(folder), weights


def history(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss_hex"], row["grad_norm_hex"]) for row in rows if "loss_hex" in row}


TWO, FOUR, DDP = {"fsdp_size": 2, "ep_size": 2}, {"fsdp_size": 4, "ep_size": 2}, {}
OTHERS = [(4, FOUR), (4, FOUR | {"ep_size": 4}), (2, TWO), (2, {"fsdp_size": 2}), (2, DDP), (1, {})]


@pytest.mark.parametrize(
    ("size", "sizes", "name", "last", "background", "others"),
    [
        (2, TWO, "llama", SAVED + 3, False, [(2, TWO), (1, {})]),
        (2, DDP, "llama", SAVED + 3, True, [(2, DDP), (2, TWO)]),
        *(nightly(4, FOUR, name, SAVED + 20, back, OTHERS) for name, back in [("llama", False), ("mixtral", True)]),
        *(nightly(size, {}, "llama", SAVED + 20, False, OTHERS) for size in (1, 2)),
    ],
)
def test_a_run_goes_on_bit_for_bit_on_its_ranks_and_within_rounding_on_others(
    ranks, tmp_path, size, sizes, name, last, background, others
):
    losses, end = ranks(size, trained, tmp_path / "whole", name, sizes, last, None, background, timeout=900)[0]
    for i, (number, parts) in enumerate(others):
        folder = tmp_path / f"{i}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{SAVED}", folder / f"checkpoint-{SAVED}")
        again, weights = ranks(number, trained, folder, name, parts, last, True, timeout=900)[0]
        assert again.keys() == set(range(SAVED + 1, last + 1))
        if (number, parts) == (size, sizes):
            assert again == {step: losses[step] for step in again}
            assert all(torch.equal(weights[key], value) for key, value in end.items())
        found, wanted = ([float.fromhex(each[step][0]) for step in sorted(again)] for each in (again, losses))
        assert found == pytest.approx(wanted, abs=1e-5, rel=0)


def finished(rank, ranks, folder, sizes):
    """Case: the weights of a model that is trained and saved as a whole."""
    _forget_accelerate()
    made = train(folder, lambda: distribute(llama(), sizes), 1, per_device_train_batch_size=2, max_steps=1)
    made.save_model()
    return {key: whole(value) for key, value in made.model.state_dict().items()}


def test_a_sharded_model_is_saved_as_a_whole_by_the_first_rank(ranks, tmp_path):
    weights = ranks(2, finished, tmp_path, TWO)[1]
    saved = load(tmp_path).state_dict()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(weights[key], value) for key, value in saved.items())
