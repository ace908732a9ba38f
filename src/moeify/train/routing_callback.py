"""`RoutingCallback`: expert load in the logs of any trainer of transformers, which need not be a `SparseTrainer`."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from moeify.folders import RUN_LOCK, locked
from moeify.layers import sparse_layers
from moeify.notices import notify
from moeify.ranks import all_reduce
from moeify.record import observe
from moeify.routing import Routing
from moeify.train import run_log
from moeify.train.calling import calling
from moeify.train.metrics import MAX_KEYS, Tally


class RoutingCallback(TrainerCallback):
    """Adds the routing metrics of `SparseTrainer` to what any trainer of transformers logs, TRL's and Axolotl's too.

        Trainer(model, arguments, train_dataset=data, callbacks=[RoutingCallback()])

    The model is one of ours, or an MoE of transformers. Every log entry with a `loss` gets at most `max_keys` metrics,
    see `moeify.train.metrics.measure`, summed over all micro-batches and ranks of the steps since the last one; so do
    TensorBoard, Trackio, W&B and all others of `report_to`. `metrics.jsonl` in the output folder has them for every
    layer, with the load of every expert, for `moeify watch` and `moeify inspect`.

    Not counted are padding, evaluation, generation, and passes that activation checkpointing repeats.

    Raises:
        ValueError: when training begins, a model without a sparse layer, or one that nn.DataParallel copies.
    """

    max_keys = MAX_KEYS + 1
    """The most metrics that are added to a log entry, for any number of layers and experts."""

    def __init__(self) -> None:
        self._tally = Tally()
        self._handles: list[RemovableHandle] = []
        self._lock = ExitStack()
        self._learns: bool | None = None
        self._said = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the sparse layers, add hooks to them, and move before the callbacks of `report_to`."""
        model: nn.Module = kwargs["model"]
        self._end()
        if args.n_gpu > 1:
            raise ValueError("nn.DataParallel copies the routers in every step; use torchrun, one process per GPU")
        _call_first(self)
        self._handles = [
            model.register_forward_pre_hook(self._begin_pass, with_kwargs=True),
            model.register_forward_hook(self._end_pass, always_call=True),
            *observe(model, self._add),
        ]
        self._tally.begin({name: layer.num_experts for name, layer in sparse_layers(model).items()})
        self._tokens, self._since = torch.zeros((), device=args.device), time.perf_counter()
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir))
            with suppress(OSError):  # locked by `SparseTrainer`, or not writable, which writing the log reports
                self._lock.enter_context(locked(folder, RUN_LOCK, "is training"))
            run_log.forget_after(folder / run_log.LOG, state.global_step)

    def _begin_pass(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._learns = model.training and torch.is_grad_enabled()
        if self._learns:
            self._tokens += _tokens(kwargs)

    def _end_pass(self, model: nn.Module, args: tuple, output: Any) -> None:
        self._learns = None

    def _add(self, name: str, routing: Routing) -> None:
        if self._learns is None and torch.is_grad_enabled() and not self._said:
            self._said = True
            notify(f"moeify: {name} is called without the model around it, so padding among its tokens counts")
        if torch.is_grad_enabled() if self._learns is None else self._learns:
            self._tally.add([(name, routing)])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add up the step's micro-batches."""
        self._tally.end_step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics, except where `SparseTrainer` adds them already."""
        if not logs or "loss" not in logs or "max_vio" in logs:
            return
        now, tokens = time.perf_counter(), float(all_reduce(self._tokens))
        if tokens:
            logs["tokens_per_second"] = tokens / max(now - self._since, 1e-9)
        self._tokens, self._since = torch.zeros_like(self._tokens), now
        logs |= run_log.report(self._tally, logs, state, str(args.output_dir), kwargs["model"])
        if state.log_history and state.log_history[-1]["step"] == state.global_step:
            state.log_history[-1] |= logs  # the trainer has already added them to this entry

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks."""
        self._end()

    def _end(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._lock.close()


def _tokens(inputs: dict[str, Any]) -> Int[Tensor, ""] | int:
    """The real tokens of a batch, without a synchronisation; 0 if it has none that could be counted."""
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids", inputs.get("inputs_embeds"))
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.bool().sum()
    return ids.shape[:2].numel() if isinstance(ids, Tensor) else 0


def _call_first(callback: TrainerCallback) -> None:
    """Put a callback before those of `report_to`, which transformers calls before all that a trainer was given."""
    handler = calling(CallbackHandler)
    if handler is None or callback not in handler.callbacks:
        notify("moeify: no trainer of transformers calls RoutingCallback; its figures are in metrics.jsonl alone")
        return
    handler.callbacks.remove(callback)
    handler.callbacks.insert(0, callback)
