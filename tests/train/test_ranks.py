"""Two processes: the same balance, one decision to stop, one checkpoint."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from ranks import gradients, hooked, llama, on_ranks, padded, resumed, stopped, waited, whole
from tiny_models import mixtral

if "forkserver" not in multiprocessing.get_all_start_methods():
    pytest.skip("a rank is forked off a server", allow_module_level=True)


@pytest.mark.parametrize(("case", "build"), [(gradients, llama), (gradients, mixtral), (hooked, mixtral)])
def test_two_ranks_have_the_balance_gradient_of_one(tmp_path, case, build):
    (one,), (first, second) = (on_ranks(ranks, case, tmp_path / str(ranks), build) for ranks in (1, 2))
    assert torch.allclose(torch.tensor(first), torch.tensor(one), rtol=1e-4, atol=1e-7)
    assert first == second
    assert torch.tensor(one[1]).norm() > 1e-3


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path):
    assert on_ranks(2, stopped, tmp_path, "SIGTERM") == [3, 3]
    assert (tmp_path / "checkpoint-3" / "MANIFEST.json").is_file()


@pytest.mark.parametrize("kind", ["gradient", "activation"])
def test_a_nan_on_one_rank_stops_all_before_the_same_step(tmp_path, kind):
    other, struck = on_ranks(2, stopped, tmp_path, kind)
    assert "is not finite in step 3" in other
    assert "is not finite in step 3" in struck
    assert (kind == "activation") == other.startswith("another process met a value")
    assert all(f"weights, which are saved in {tmp_path / 'checkpoint-2'}." in each for each in (other, struck))
    assert (tmp_path / "checkpoint-2" / "MANIFEST.json").is_file()


def test_padding_alone_on_one_rank_adds_nothing_and_the_others_learn(tmp_path):
    first, second = on_ranks(2, padded, tmp_path)
    assert len(first) == 4
    assert first == second
    assert torch.isfinite(torch.tensor(first)).all()


def test_a_stopped_rank_is_an_error_within_the_timeout_that_was_asked_for(tmp_path):
    (error, seconds), _ = on_ranks(2, waited, tmp_path, 3)
    assert error == "RuntimeError"
    assert 3 <= seconds < 60  # gloo waits for half an hour if it is not told


def test_ranks_resume_bit_for_bit(tmp_path):
    on_ranks(2, whole, tmp_path, mixtral)
    log, last = tmp_path / "metrics.jsonl", tmp_path / "checkpoint-4" / "model.safetensors"
    before, weights = _bits(log), last.read_bytes()
    (tmp_path / "checkpoint-4" / "MANIFEST.json").unlink()
    on_ranks(2, resumed, tmp_path, mixtral)
    assert _bits(log) == before
    assert last.read_bytes() == weights


def _bits(log: Path):
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [(row["step"], row["loss_hex"], row["grad_norm_hex"]) for row in rows]
