"""`BalanceCallback`: balancing losses and controllers in any trainer of transformers, which need not be subclassed."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moeify.balance import Control, control
from moeify.layers import sparse_layers
from moeify.notices import notify
from moeify.routers import begin_step
from moeify.train.activation_checkpointing import enable
from moeify.train.arguments import SparseArguments
from moeify.train.balance_hook import BalanceHook, balance_hook
from moeify.train.calling import calling
from moeify.train.checkpoint.saving import bare
from moeify.train.decoder_mask import with_decoder_mask
from moeify.train.trainer import SparseTrainerMixin


class BalanceCallback(TrainerCallback):
    """Balances the experts in any trainer of transformers, also those of Axolotl and LLaMA-Factory.

        Trainer(model, arguments, train_dataset=data, callbacks=[BalanceCallback(SparseArguments(balance=1e-2))])

    The gradients are those of `SparseTrainer`, by `balance_hook`; the trainer computes and logs its own loss as before.
    A controller moves after each step of the optimizer. Activation checkpointing, where it is on, keeps the decisions.
    A checkpoint holds the controllers' biases, but neither a rule's memory nor the loads of the last step: the first
    step after a resume has no gradient of the balance loss.

    Args:
        sparse: the losses and the controller. `dropout` is set by the callback `ExpertDropout`, and `progress` unused.

    Raises:
        ValueError: when training begins, settings that cannot work, as `SparseTrainer` refuses them; in a step, what
            `balance_hook` raises.
        TypeError: a trainer whose batches are prompts.
    """

    def __init__(self, sparse: SparseArguments | None = None) -> None:
        self.sparse = SparseArguments() if sparse is None else sparse
        if self.sparse.dropout is not None:
            raise ValueError("BalanceCallback sets no dropout; pass the callback ExpertDropout(dropout) beside it")
        self._hook: BalanceHook | None = None
        self._control: Control | None = None
        self._trainer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hook the model, attach the controller, and count the batches that the trainer fetches for each step."""
        model: nn.Module = kwargs["model"]
        self._end()
        trainer: Any = calling(transformers.Trainer)
        self._require(trainer, model)
        if args.n_gpu > 1:
            raise ValueError("nn.DataParallel copies the routers in every step; use torchrun, one process per GPU")
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            enable(model, _checkpointing_options(args))
        own_loss = getattr(trainer, "aux_loss_enabled", False)
        if own_loss:  # trainers of TRL request the balance loss of the model
            trainer.aux_loss_enabled = False
        scaler = getattr(trainer.accelerator, "scaler", None)
        self._hook = balance_hook(model, self.sparse, **({} if scaler is None else {"scale": scaler.get_scale}))
        self._hook.step = state.global_step
        if self.sparse.controller is not None:
            self._control = _attach(model, kwargs["optimizer"], self.sparse)
        self._count_batches(trainer, self._hook)
        if state.is_world_process_zero:
            off = "; the model's own balance loss is turned off, it would count twice"
            notify(f"moeify: {self.sparse.describe()}{off if own_loss or self._hook.found_own_loss else ''}")

    def _require(self, trainer: Any, model: nn.Module) -> None:
        if trainer is None:
            raise ValueError(
                "BalanceCallback is not called by a trainer of transformers, so it cannot see the batches of a step; "
                "use moeify.train.balance_hook in a loop of your own"
            )
        if isinstance(trainer, SparseTrainerMixin):
            raise ValueError(
                f"{type(trainer).__name__} balances by itself, and BalanceCallback would balance once more; drop one"
            )
        if trainer.is_deepspeed_enabled and trainer.args.fp16:
            raise ValueError("DeepSpeed's loss scale of fp16 does not reach the balance loss; use bf16")
        if self.sparse.watches and not sparse_layers(model):
            raise ValueError(
                f"{type(model).__name__} is dense, there is nothing to balance; make it sparse with moeify.sparsify, "
                "or drop BalanceCallback"
            )

    def _count_batches(self, trainer: Any, hook: BalanceHook) -> None:
        fetch = trainer.get_batch_samples

        def counted(*args: Any, **kwargs: Any) -> Any:
            batches, items = fetch(*args, **kwargs)
            batches = [with_decoder_mask(trainer.model, batch) for batch in batches]
            hook.begin(batches, trainer.args.device, copies=trainer.get_tp_size())
            return batches, items

        self._trainer, trainer.get_batch_samples = trainer, counted

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give routers whose rule depends on the step its number."""
        begin_step(kwargs["model"], state.global_step, seed=args.seed)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the balance reached the gradients."""
        assert self._hook is not None
        self._hook.check()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The loads of this step are the f of the next."""
        assert self._hook is not None
        self._hook.end()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks and the controller."""
        self._end()

    def _end(self) -> None:
        for attached in (self._hook, self._control):
            if attached is not None:
                attached.remove()
        if self._trainer is not None:
            del self._trainer.get_batch_samples
        self._hook = self._control = self._trainer = None


def _checkpointing_options(args: TrainingArguments) -> dict[str, Any]:
    """What else the trainer was asked for, such as every how many layers; all but whether it is re-entrant."""
    names = "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"  # the second is its older name
    asked = next((kept for name in names if (kept := getattr(args, name, None))), {})
    return {name: value for name, value in asked.items() if name != "use_reentrant"}


def _attach(model: nn.Module, optimizer: Any, sparse: SparseArguments) -> Control:
    assert sparse.controller is not None
    return control(model, bare(optimizer), sparse.controller)
