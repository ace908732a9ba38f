"""Cases for ranks: trainings of models that transformers' engine shards, by `SparseTrainer`."""

from __future__ import annotations

import os
import signal
import time
import warnings
from pathlib import Path

import torch
from transformers import TrainerCallback

from moeify import Recipe, sparsify
from moeify.balance import Sign
from moeify.layers import sparse_layers
from moeify.parallel import distribute
from moeify.routers import TopK
from moeify.train import SparseArguments
from ranks import BalanceOnly, SparseTrainer, train
from tiny_models import causal_lm, deepseek_v3, mixtral

BATCH = 32


def llama():
    """With a selection bias, which a controller moves."""
    torch.manual_seed(0)
    recipe = Recipe(num_experts=4, router=lambda d, e: TopK(d, e, selection_bias=True))
    return sparsify(causal_lm("llama"), recipe, verbose=False)


BUILD = {"llama": llama, "mixtral": mixtral, "deepseek_v3": deepseek_v3}


def whole(tensor):
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach().clone()


class Keep(TrainerCallback):
    """Keeps the gradients of the first steps."""

    def __init__(self, steps):
        self.steps, self.gradients = steps, []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if len(self.gradients) < self.steps:
            self.gradients.append({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})


def run(rank, ranks, folder, name, sizes, accumulation, balance_only=False):
    """Case: losses, metrics, gradients, weights and selection biases of a training of whatever number of ranks."""
    warnings.simplefilter("ignore")
    _forget_accelerate()
    shares = ranks // sizes.get("tp_size", 1)
    keep = Keep(2 if balance_only else 1)  # the balance loss has no gradient in the first step
    controller = Sign(0.1) if name != "mixtral" and not balance_only else None
    made = train(
        folder, lambda: distribute(BUILD[name](), sizes), 1, keep, kind=BalanceOnly if balance_only else SparseTrainer,
        sparse=SparseArguments(balance=1.0 if balance_only else 0.1, z=0.01, controller=controller),
        per_device_train_batch_size=BATCH // shares // accumulation, gradient_accumulation_steps=accumulation,
        max_steps=3, optim="adamw_torch", learning_rate=0.0 if balance_only else 1e-3, max_grad_norm=1.0,
        data_size=96, ddp_timeout=30,
    )  # fmt: skip
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    layers = sparse_layers(made.model).values()
    biases = [getattr(o, k).tolist() for part in layers for o, k in part.selection_biases()]
    weights = {key: whole(p) for key, p in made.model.named_parameters()}
    return logged, keep.gradients, weights, biases


def compared(rank, ranks, folder, name, sizes, accumulation, balance_only, wanted):
    """Case: the largest relative differences from what a training of one process gave."""
    found = run(rank, ranks, folder, name, sizes, accumulation, balance_only)
    logged = {
        f"{key} of step {i + 1}": _off(torch.tensor(float(f[key])), torch.tensor(float(w[key])))
        for i, (f, w) in enumerate(zip(found[0], wanted[0], strict=True))
        for key in w
        if not key.endswith(("_per_second", "max_vio_micro", "max_vio_micro_worst"))
    }
    gradients = {
        f"gradient of {key} in step {i + 1}": _off(f[key], w[key])
        for i, (f, w) in enumerate(zip(found[1], wanted[1], strict=True))
        for key in w
    }
    weights = {key: _off(found[2][key], value) for key, value in wanted[2].items()}
    assert found[3] == wanted[3], f"biases {found[3]} are not {wanted[3]}"
    return [max(part.items(), key=lambda item: item[1]) for part in (logged, gradients, weights)]


def _off(found, wanted):
    error, size = (found - wanted).norm().item(), wanted.norm().item()
    return error / size if size > 1e-6 else error


def _forget_accelerate():
    """Let accelerate take the ranks as they are, which it would initialise itself."""
    from accelerate.state import AcceleratorState, GradientState

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Hit(TrainerCallback):
    """In step 3, and on one rank only, a value becomes NaN, or the process is stopped."""

    def __init__(self, kind):
        self.kind = kind

    def on_step_begin(self, args, state, control, model, **kwargs):
        if args.process_index == 1 and state.global_step == 2:
            if self.kind == "SIGSTOP":
                (Path(args.output_dir) / "pid").write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
            elif self.kind == "activation":
                model.model.layers[0].self_attn.register_forward_hook(lambda m, a, y: (y[0] / 0 * 0, *y[1:]))
            else:
                model.lm_head.register_forward_hook(_nan_gradient)


def _nan_gradient(module, args, output):
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient * float("nan"))


def struck(rank, ranks, folder, name, sizes, kind):
    """Case: the step in which this rank stopped, and why."""
    warnings.simplefilter("ignore")
    _forget_accelerate()
    weights = {}
    try:
        train(
            folder, lambda: weights.setdefault("model", distribute(BUILD[name](), sizes)), 1, Hit(kind),
            per_device_train_batch_size=2, learning_rate=1e-3, save_strategy="steps", save_steps=100, ddp_timeout=20,
        )  # fmt: skip
    except FloatingPointError as error:
        finite = all(torch.isfinite(whole(p)).all() for p in weights["model"].parameters())
        return str(error), finite
    return None


def waited(rank, ranks, folder, name, sizes, timeout):
    """Case: raises what a rank raises, and after how many seconds, when the other is stopped in step 3.

    The pool then replaces its ranks, whose connections are gone.
    """
    warnings.simplefilter("ignore")
    _forget_accelerate()
    began = time.monotonic()
    try:
        train(
            folder, lambda: distribute(BUILD[name](), sizes), 1, Hit("SIGSTOP"),
            per_device_train_batch_size=2, ddp_timeout=timeout,
        )  # fmt: skip
    except Exception as error:
        if rank == 0:
            os.kill(int((Path(folder) / "pid").read_text()), signal.SIGCONT)
        raise RuntimeError(f"{type(error).__name__} after {time.monotonic() - began:.1f} seconds") from None
