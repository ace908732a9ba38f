"""Ranks as processes of their own, for tests of what several of them do together.

They are forked off a server that runs no kernels: a fork of a process with threads of theirs waits for them for ever.
It has read what all ranks need, which none of them reads again.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

from moeify.ranks import all_reduce, anywhere, broadcast, join
from moeify.sparsify import Recipe, sparsify
from moeify.train import BalanceCallback, RoutingCallback, SparseArguments, SparseTrainer, SparseTrainerMixin
from tiny_models import VOCABULARY, causal_lm, mixtral

# Modules of this folder are not found by the server, which says nothing and lets every rank read all by itself.
PRELOAD = ["moeify.train", "transformers.models.llama.modeling_llama", "transformers.models.mixtral.modeling_mixtral"]


class Silent(transformers.Trainer):
    """Has no loss of its own, so that what remains is the balance."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (0 * loss, outputs) if return_outputs else 0 * loss


class BalanceOnly(SparseTrainerMixin, Silent):
    pass


class PaddingOnOne(SparseTrainer):
    """In step 2, one rank has nothing but padding."""

    def training_step(self, model, inputs, *args, **kwargs):
        if self.args.process_index == 1 and self.state.global_step == 1:
            inputs = {**inputs, "attention_mask": torch.zeros_like(inputs["attention_mask"])}
        return super().training_step(model, inputs, *args, **kwargs)


class PlainTrainer(transformers.Trainer):
    """Takes what `train` gives a sparse trainer."""

    def __init__(self, *args, sparse=None, **kwargs):
        super().__init__(*args, **kwargs)


class SilentPlain(PlainTrainer, Silent):
    pass


class Record(TrainerCallback):
    def __init__(self):
        self.routers = []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        named = [(n, p.grad) for n, p in model.named_parameters() if "router" in n or "gate.weight" in n]
        self.routers.append(torch.cat([gradient.flatten() for _, gradient in named]).tolist())


class Strike(TrainerCallback):
    """In step 3, and on one rank only, a signal arrives, a value becomes NaN, or the process is stopped."""

    def __init__(self, kind):
        self.kind = kind

    def on_step_begin(self, args, state, control, model, **kwargs):
        if args.process_index == 1 and state.global_step == 2:
            if self.kind in ("SIGTERM", "SIGSTOP"):
                (Path(args.output_dir) / "pid").write_text(str(os.getpid()))
                os.kill(os.getpid(), getattr(signal, self.kind))
            elif self.kind == "gradient":
                model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))
            else:
                model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda m, args, output: output / 0)


def llama():
    torch.manual_seed(0)
    return sparsify(causal_lm("llama"), Recipe(num_experts=4), verbose=False)


def train(folder, build, ranks, *callbacks, kind=SparseTrainer, resume=None, sparse=None, data_size=32, **arguments):
    generator = torch.Generator().manual_seed(0)
    data = []
    for length in torch.randint(5, 13, (data_size,), generator=generator).tolist():
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


def hooked(rank, ranks, folder, build):
    record, balance = Record(), BalanceCallback(SparseArguments(balance=1.0, z=0.1))
    train(folder, build, ranks, balance, record, kind=SilentPlain, learning_rate=0.0)
    return record.routers


def stopped(rank, ranks, folder, kind):
    try:
        return train(folder, llama, ranks, Strike(kind)).state.global_step
    except FloatingPointError as error:
        return str(error)


def routed(rank, ranks, folder):
    made = train(folder, mixtral, ranks, RoutingCallback(), kind=PlainTrainer, learning_rate=0.0)
    return next(entry for entry in made.state.log_history if "loss" in entry)


def padded(rank, ranks, folder):
    made = train(folder, llama, ranks, kind=PaddingOnOne)
    return [(entry["loss"], entry["load_entropy"]) for entry in made.state.log_history if "loss" in entry]


def waited(rank, ranks, folder, timeout):
    """What a rank raises, and after how many seconds, when the other is stopped in step 3."""
    began = time.monotonic()
    try:
        train(folder, llama, ranks, Strike("SIGSTOP"), ddp_timeout=timeout)
    except Exception as error:
        if rank == 0:
            os.kill(int((Path(folder) / "pid").read_text()), signal.SIGCONT)
        return type(error).__name__, time.monotonic() - began
    return None


def joined(rank, ranks, timeout):
    join(timeout, "gloo")
    if rank == 1:
        time.sleep(3 * timeout)
        return None
    try:
        all_reduce(torch.ones(1))
    except RuntimeError as error:
        return str(error)


def resumed(rank, ranks, folder, build):
    train(folder, build, ranks, save_strategy="steps", save_steps=2, resume=True)


def whole(rank, ranks, folder, build):
    train(folder, build, ranks, save_strategy="steps", save_steps=2)


def defaults(rank, ranks, moe, x):
    moe = copy.deepcopy(moe)  # what ranks are given lies in memory that they share
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    moe(x.chunk(ranks)[rank])
    return moe.router.default.tolist()


def collectives(rank, ranks):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    mine = torch.tensor(rank + 1.0)
    total, first = all_reduce(mine.clone()), broadcast(mine.clone())
    return total.item(), first.item(), anywhere(rank == 1), anywhere(False)


def _become(rank, ranks, port, case, arguments, answers):
    from accelerate.state import AcceleratorState, GradientState

    torch.set_num_threads(1)  # two ranks of two threads would wait for each other's cores
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
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOAD)
    answers = server.Queue()
    workers = [server.Process(target=_become, args=(r, ranks, port, case, arguments, answers)) for r in range(ranks)]
    for worker in workers:
        worker.start()
    found = {}
    try:
        for _ in workers:
            rank, answer, error = answers.get(timeout=300)
            assert error is None, f"rank {rank}: {error}"
            found[rank] = answer
    finally:
        for worker in workers:
            worker.kill()
    return [found[rank] for rank in range(ranks)]
