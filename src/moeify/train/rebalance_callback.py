"""`Rebalance`: a callback of the trainer that moves experts between processes where it pays."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moeify.notices import notify
from moeify.parallel.rebalance import Rebalancer
from moeify.parallel.rebalancing import Rebalancing


class Rebalance(TrainerCallback):
    """Moves experts after optimizer steps, as `moeify.parallel.Rebalancing` does, and back when training ends.

        planned = plan(model, cluster, length=2048, sequences=64)
        placed = Placed(planned.step, Layout(fsdp=8, ep=8))
        moving = Rebalance(Rebalancer(placed, steps=arguments.max_steps))
        model = distribute(model, {"fsdp_size": 8, "ep_size": 8})
        trainer = SparseTrainer(model, arguments, callbacks=[moving], ...)

    Args:
        rebalancer: of one training, without `spare`; `shadows=1` lets hot experts be computed by several processes.

    Raises:
        ValueError: when training begins, a model whose experts cannot move, or do not fit the rebalancer.
    """

    def __init__(self, rebalancer: Rebalancer) -> None:
        self.rebalancer = rebalancer
        self.running: Rebalancing | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the experts."""
        optimizer = kwargs["optimizer"]
        self.running = Rebalancing(kwargs["model"], getattr(optimizer, "optimizer", optimizer), self.rebalancer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move experts, if it pays."""
        assert self.running is not None
        if (move := self.running.step()) is not None and state.is_world_process_zero:
            made = f"moved, {move.bytes / 1e6:,.1f} MB," if move.bytes else "are lent to other processes"
            notify(
                f"moeify: step {state.global_step}: experts of {move.layers} layers {made} "
                f"to save {1000 * move.saves:,.2f} ms a step"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put all experts back into their order."""
        if self.running is not None:
            self.running.end()
            self.running = None
