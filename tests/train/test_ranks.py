"""Two processes: the same balance, one decision to stop, one checkpoint."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

from moeify.sparsify import Recipe, sparsify
from moeify.train import SparseArguments, SparseTrainer, SparseTrainerMixin
from tiny_models import VOCABULARY, causal_lm, mixtral

if "fork" not in multiprocessing.get_all_start_methods():
    pytest.skip("a rank is a forked process", allow_module_level=True)


class Silent(transformers.Trainer):
    """Has no loss of its own, so that what remains is the balance."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (0 * loss, outputs) if return_outputs else 0 * loss


class BalanceOnly(SparseTrainerMixin, Silent):
    pass


class Record(TrainerCallback):
    def __init__(self):
        self.routers = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        named = [(n, p.grad) for n, p in model.named_parameters() if "router" in n or "gate.weight" in n]
        self.routers.append(torch.cat([gradient.flatten() for _, gradient in named]).tolist())


class Strike(TrainerCallback):
    """In step 3, and on one rank only, a signal arrives or a gradient becomes NaN."""

    def __init__(self, kind):
        self.kind = kind

    def on_step_begin(self, args, state, control, model, **kwargs):
        if args.process_index == 1 and state.global_step == 2:
            if self.kind == "signal":
                signal.raise_signal(signal.SIGTERM)
            else:
                model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))


def llama():
    torch.manual_seed(0)
    return sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False)


def train(folder, build, ranks, *callbacks, kind=SparseTrainer, resume=None, sparse=None, **arguments):
    generator = torch.Generator().manual_seed(0)
    data = []
    for length in torch.randint(5, 13, (32,), generator=generator).tolist():
        ids = torch.randint(3, VOCABULARY, (12,), generator=generator)
        mask = (torch.arange(12) < length).long()
        data.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)})
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 4 // ranks, "gradient_accumulation_steps": 2, "use_cpu": True,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_steps": 1, "max_grad_norm": 0.0,
        "ddp_find_unused_parameters": False,
    } | arguments  # fmt: skip
    made = kind(
        build(), TrainingArguments(folder, **settings), train_dataset=data, callbacks=list(callbacks), sparse=sparse
    )
    made.train(resume_from_checkpoint=resume)
    return made


def gradients(rank, ranks, folder, build):
    record, sparse = Record(), SparseArguments(balance=1.0, z=0.1)
    train(folder, build, ranks, record, kind=BalanceOnly, sparse=sparse, learning_rate=0.0)
    return record.routers


def stopped(rank, ranks, folder, kind):
    try:
        return train(folder, llama, ranks, Strike(kind)).state.global_step
    except FloatingPointError as error:
        return str(error)


def resumed(rank, ranks, folder, build):
    train(folder, build, ranks, save_strategy="steps", save_steps=2, resume=True)


def whole(rank, ranks, folder, build):
    train(folder, build, ranks, save_strategy="steps", save_steps=2)


def _become(rank, ranks, port, case, arguments, answers):
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in where.items()} | {"GLOO_SOCKET_IFNAME": "lo"})
    try:
        answers.put((rank, case(rank, ranks, *arguments), None))
    except BaseException as error:
        answers.put((rank, None, f"{type(error).__name__}: {error}"))
    answers.close()
    answers.join_thread()
    os._exit(0)


def on_ranks(ranks, case, *arguments):
    """What each rank answers when all of them run `case(rank, ranks, ...)`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    workers = [fork.Process(target=_become, args=(r, ranks, port, case, arguments, answers)) for r in range(ranks)]
    for worker in workers:
        worker.start()
    found = {}
    try:
        for _ in workers:
            rank, answer, error = answers.get(timeout=60)
            assert error is None, f"rank {rank}: {error}"
            found[rank] = answer
    finally:
        for worker in workers:
            worker.kill()
    return [found[rank] for rank in range(ranks)]


@pytest.mark.parametrize("build", [llama, mixtral])
def test_two_ranks_have_the_balance_gradient_of_one(tmp_path, build):
    (one,), (first, second) = (on_ranks(ranks, gradients, tmp_path / str(ranks), build) for ranks in (1, 2))
    assert torch.allclose(torch.tensor(first), torch.tensor(one), rtol=1e-4, atol=1e-7)
    assert first == second
    assert torch.tensor(one[1]).norm() > 1e-3


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path):
    assert on_ranks(2, stopped, tmp_path, "signal") == [3, 3]
    assert (tmp_path / "checkpoint-3" / "MANIFEST.json").is_file()


def test_a_nan_on_one_rank_stops_all_before_the_same_step(tmp_path):
    messages = on_ranks(2, stopped, tmp_path, "nan")
    assert all("is not finite in step 3" in message for message in messages)
    assert (tmp_path / "checkpoint-2" / "MANIFEST.json").is_file()


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
