"""`SparseTrainer`: the trainer of transformers with balancing losses, load controllers and checkpoints, for MoE."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SaveStrategy

from moeify import ranks
from moeify.balance import Control, control
from moeify.layers import sparse_layers
from moeify.moe import passing_nonfinite
from moeify.notices import notify
from moeify.ranks import OnAnotherRank
from moeify.record import observe
from moeify.routers import begin_step
from moeify.train import empty, run_log
from moeify.train.activation_checkpointing import enable
from moeify.train.arguments import SparseArguments
from moeify.train.callbacks import ExpertDropout, ProgressLine, SaveOnSignal
from moeify.train.checkpoint.saving import Saving, bare
from moeify.train.checkpoint.shards import is_sharded
from moeify.train.columns import Columns
from moeify.train.decoder_mask import with_decoder_mask
from moeify.train.finite import find_nonfinite, is_finite
from moeify.train.freeze import require_learning_routers
from moeify.train.loss import StepLoss, Watch, count_decisions, disable_own_loss
from moeify.train.metrics import Tally


class SparseTrainerMixin(Columns, Saving):
    """Adds balancing losses, controllers and checkpoints to a trainer of transformers; inherit it before that class.

        class SparseSFTTrainer(SparseTrainerMixin, trl.SFTTrainer): ...

    Adds a balance loss whose gradient is the same however a step is cut into micro-batches, ranks and padding (see
    `moeify.train.loss`), controllers, routing metrics, activation checkpointing that keeps decisions, checkpoints
    that restore the experts, columns of the data for routers to look up, and a halt before a non-finite step. The
    logged `loss` stays the task's loss.

    Args:
        args: what the trainer takes.
        sparse: how experts are kept balanced.
        kwargs: what the trainer takes.

    Raises:
        ValueError: settings that cannot work with experts; the message names what to change.
        FloatingPointError: in `train`, a loss or gradient that is not finite; weights are untouched and saved.
    """

    def __init__(self, *args: Any, sparse: SparseArguments | None = None, **kwargs: Any) -> None:
        self.sparse = SparseArguments() if sparse is None else sparse
        model = args[0] if args else kwargs.get("model")
        self._own_loss_off = isinstance(model, nn.Module) and disable_own_loss(model)  # before a trainer relies on it
        with _saving_sharded(model, args[1] if len(args) > 1 else kwargs.get("args")):
            super().__init__(*args, **kwargs)
        if getattr(self, "aux_loss_enabled", False):  # trainers of TRL request the balance loss of the model
            self.aux_loss_enabled, self._own_loss_off = False, True
        if self.args.n_gpu > 1:
            raise ValueError("nn.DataParallel copies the routers in every step; use torchrun, one process per GPU")
        ranks.wait_at_most(self.args.ddp_timeout)  # which transformers passes on for GPUs only
        self.args.logging_nan_inf_filter = False  # would show a NaN as the average of the losses before it
        self._watch, self._step_loss, self._tally = Watch(), StepLoss(self.sparse.scope), Tally()
        self._hooks: list[RemovableHandle] = []
        self._control: Control | None = None
        self._batches: list[Any] = []
        self._losses: list[Tensor] = []
        self.written = []
        self._said: set[tuple[str, bool]] = set()
        self._tokens, self._since, self._speed = 0.0, time.perf_counter(), "tokens_per_second"
        self._stopper, self._line = SaveOnSignal(), ProgressLine()
        self.add_callback(_Steps(self))
        self.add_callback(self._stopper)
        if self.sparse.dropout is not None:
            self.add_callback(ExpertDropout(self.sparse.dropout))
        if self.sparse.progress:
            self.remove_callback(ProgressCallback)
            self.remove_callback(PrinterCallback)
            self.add_callback(self._line)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or resume from a checkpoint: True for the newest valid one, or the path of one.

        A run that has done all its steps takes no more. Checkpoints in the output folder of another
        run or of later steps are moved into a folder `earlier-1` beside them.

        Raises:
            FileNotFoundError: there is no valid checkpoint; the message names the reason.
            OSError: another process is training into the output folder.
        """
        with self._alone():
            checkpoint = self._begin_run(resume_from_checkpoint)
            try:
                return super().train(checkpoint, *args, **kwargs)
            finally:
                self._stopper.restore()
                self._line.close()
                self._unhook()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """An epoch; transformers checks after a step whether it was the last one, and not before the first."""
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True
        return None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the optimizer, and attach the controller to it."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.sparse.controller is not None:
            if self._control is not None:
                self._control.remove()
            self._control = control(self.model, bare(optimizer), self.sparse.controller)
        return optimizer

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetch the micro-batches of a step, and count its tokens over all ranks."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [with_decoder_mask(self.model, batch) for batch in batches]
        self.begin_step(batches)
        transformers.set_seed(_mix(self.args.seed, self.state.global_step, self.args.process_index))
        return batches, items

    def begin_step(self, batches: list[Any]) -> None:
        """Count what the micro-batches of a step hold, before the first of them is computed."""
        self._batches, self._losses = [self.model_inputs(batch) for batch in batches], []
        total = self._step_loss.begin(self._batches, self.args.device, copies=self.get_tp_size())
        tokens = total["attention_mask"] or total["input_ids"]
        self._speed = "tokens_per_second" if tokens else "samples_per_second"  # images and sounds have no tokens
        self._tokens += tokens or total["rows"]

    def model_inputs(self, inputs: Any) -> Any:
        """What the model is called with for a micro-batch, for trainers whose batches hold something else."""
        return inputs

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's own loss, plus this micro-batch's part of the balance loss when training."""
        inputs = with_decoder_mask(self.model, inputs)
        if is_sharded(
            self.model
        ):  # where ranks wait for each other inside; what is not finite, all find after backward
            with passing_nonfinite():
                return self._loss(model, inputs, return_outputs, num_items_in_batch)
        if not isinstance(model, DistributedDataParallel) or not model.training:
            return self._loss(model, inputs, return_outputs, num_items_in_batch)
        with ranks.failing_together(self.args.device):  # before backward, where others would wait for it
            return self._loss(model, inputs, return_outputs, num_items_in_batch)

    def _loss(self, model: nn.Module, inputs: Any, return_outputs: bool, num_items_in_batch: Any) -> Any:
        self._watch.forget()
        sizes, padding = count_decisions(self.model_inputs(inputs)), empty.is_padding(inputs)
        computed = super().compute_loss(
            model, empty.as_real(inputs) if padding else inputs, return_outputs, num_items_in_batch
        )
        loss, outputs = computed if return_outputs else (computed, None)
        if padding or not (torch.isfinite(loss).all() or empty.has_labels(inputs)):
            self._notify_once("all padding" if padding else "without a label to predict", training=model.training)
            loss = empty.zero(loss)
        extra = self._balance(sizes, counts=not padding) if model.training and self._hooks else None
        if extra is not None:
            loss = loss + extra.to(loss.device) * self._divisor(num_items_in_batch)
            self._extra = extra.detach().to(loss.device)
        return (loss, outputs) if return_outputs else loss

    def _notify_once(self, what: str, *, training: bool) -> None:
        place = f"a micro-batch of step {self.state.global_step + 1}" if training else "an evaluation batch"
        if (what, training) not in self._said:
            self._said.add((what, training))
            notify(f"moeify: {place} is {what}; it, and all that are, count with a loss of 0")

    def _balance(self, sizes: dict[str, int], *, counts: bool) -> Tensor | None:
        """What a micro-batch adds to the loss of its step, times the ranks, over which gradients are averaged.

        One of padding adds nothing, and does not count.
        """
        if not self.sparse.watches and not self._watch.seen:
            return None
        decisions = self._watch.take()
        self._step_loss.add(decisions, counts=counts)
        self._tally.add(decisions, counts=counts)
        if not counts:
            return None
        extra = self._step_loss.weighted(self.sparse, self.state.global_step, decisions, sizes)
        return None if extra is None else extra * (self.accelerator.num_processes // self.get_tp_size())

    def _divisor(self, num_items_in_batch: Any) -> int:
        """What `training_step` will divide the loss by: the number of micro-batches, or 1 if it counts tokens."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_items or self.compute_loss_func is not None
        return 1 if scaled else self.current_gradient_accumulation_steps

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch forward and backward; after the last one, stop if anything is not finite."""
        self._extra = None
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except FloatingPointError as error:
            self._halt(model, error)
        self._losses.append(loss)
        scaled = getattr(self.accelerator, "scaler", None) is not None  # which skips infinite gradients by itself
        if self.accelerator.sync_gradients and not is_finite(self._losses, model, gradients=not scaled):
            self._halt(model)
        return loss if self._extra is None else loss - self._extra

    def _halt(self, model: nn.Module, error: FloatingPointError | None = None) -> NoReturn:
        """Save a checkpoint and raise, on all ranks in the same step."""
        step = self.state.global_step
        if isinstance(error, OnAnotherRank):
            found = f"{error} that is not finite in step {step + 1}"
        else:
            batches = [empty.as_real(batch) for batch in self._batches]
            whole = self.accelerator.unwrap_model(model)
            where = find_nonfinite(whole, self._prepare_input(batches), sharded=is_sharded(self.model))
            found = f"{where} is not finite in step {step + 1}"
            found = found if error is None else f"{error}; first, {found}"
        try:
            self._save_checkpoint(model, trial=None)
            failed = self.failures > 0
        except Exception as reason:
            notify(f"moeify: no checkpoint of step {step} could be saved: {reason}")
            failed = True
        failed = ranks.anywhere(failed, self.args.device)
        saved = "could not be saved" if failed else f"are saved in {self._checkpoint_folder(step)}"
        raise FloatingPointError(
            f"{found}; the optimizer has not touched the weights, which {saved}. "
            "Lower the learning rate, clip gradients (max_grad_norm=1.0), "
            "look at the batch, or use bf16 in the place of fp16; then train(resume_from_checkpoint=True)"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the routing metrics to what the trainer logs; all of them, per layer, go to metrics.jsonl."""
        if "loss" in logs:
            now = time.perf_counter()
            speed, self._tokens, self._since = self._tokens / max(now - self._since, 1e-9), 0.0, now
            logs |= {self._speed: speed}
            logs |= run_log.report(self._tally, logs, self.state, str(self.args.output_dir), self.model)
        super().log(logs, *args, **kwargs)

    def begin(self) -> None:
        """Called when the model is wrapped and loaded, before the first step."""
        self._begin_checkpointing()
        self._unhook()
        layers = sparse_layers(self.model)
        self._tally.begin({name: layer.num_experts for name, layer in layers.items()}, copies=self.get_tp_size())
        if layers:
            if self.sparse.balance != 0 or self.sparse.z != 0:
                require_learning_routers(self.model)
            self._hooks = observe(self.model, self._watch.observe)
        elif self.sparse.watches:
            raise ValueError(
                f"{type(self.model).__name__} is dense, there is nothing to balance; make it sparse with "
                "moeify.sparsify, or train it as it is with SparseArguments(balance=0)"
            )
        self._own_loss_off = disable_own_loss(self.model) or self._own_loss_off
        if self.is_world_process_zero():
            run_log.forget_after(Path(str(self.args.output_dir)) / run_log.LOG, self.state.global_step)
            own = "; the model's own balance loss is turned off, it would count twice" if self._own_loss_off else ""
            notify(f"moeify: {self.sparse.describe()}{own}")
        self._since = time.perf_counter()

    def _unhook(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    def _begin_checkpointing(self) -> None:
        for name in ("activation_checkpointing", "gradient_checkpointing"):  # the second name is deprecated in 5.23
            if getattr(self.args, name, False):
                enable(self.model, getattr(self.args, f"{name}_kwargs", None))
                return


class SparseTrainer(SparseTrainerMixin, transformers.Trainer):
    """`transformers.Trainer` for sparse models, ours and those of transformers; see `SparseTrainerMixin`."""


class _Steps(TrainerCallback):
    """Calls the trainer at events for which it has no method of its own."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        transformers.set_seed(_mix(args.seed, int(state.epoch or 0), -1))  # the order of data, on all ranks alike

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin_step(self.trainer.model, state.global_step, seed=args.seed)

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._step_loss.end()
        self.trainer._tally.end_step()
        for target in self.trainer.sparse.targets:
            target.step()


@contextmanager
def _saving_sharded(model: Any, args: TrainingArguments | None) -> Generator[None]:
    """Let a trainer of transformers be made, which refuses to save models that are sharded before it gets them."""
    if args is None or not getattr(model, "is_distributed_loading_by_transformers", False):
        yield
        return
    asked, args.save_strategy = args.save_strategy, SaveStrategy.NO
    try:
        yield
    finally:
        args.save_strategy = asked


def _mix(seed: int, step: int, rank: int) -> int:
    """A seed that is a function of nothing else, so that a resumed run draws what it would have drawn."""
    return (seed * 1_000_003 + step * 7_919 + rank + 1) % 2**32
