"""Callbacks of the trainer: expert dropout, a schedule of k, a checkpoint on a signal, and a progress line."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moeify.experts import FFN
from moeify.notices import notify
from moeify.ranks import anywhere
from moeify.routers import Router
from moeify.schedule import Schedule
from moeify.train.arguments import at


class ExpertDropout(TrainerCallback):
    """Sets the dropout inside all experts, by a schedule over optimizer steps (expert dropout: Switch, section 2.4).

    Raises:
        ValueError: when training begins, a model without `moeify.experts.FFN`.
    """

    def __init__(self, p: float | Schedule) -> None:
        self.p = p

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the experts."""
        model: nn.Module = kwargs["model"]
        self.experts = [module for module in model.modules() if isinstance(module, FFN)]
        if not self.experts:
            raise ValueError(
                f"expert dropout was asked for, but {type(model).__name__} has no experts of moeify; the MoE blocks of "
                "transformers have no dropout in their experts, leave SparseArguments(dropout=None)"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the step's dropout."""
        for experts in self.experts:
            experts.dropout.p = at(self.p, state.global_step)


class KSchedule(TrainerCallback):
    """Sets how many experts a token uses, by a schedule over optimizer steps, rounded (SMoE-Dropout: k grows to E).

    It sets the `k` of every router of moeify with a settable one, see `Router.settable_k`.

    Raises:
        ValueError: when training begins, a model without such a router; in training, a k outside 1..E.
    """

    def __init__(self, k: Schedule) -> None:
        self.k = k

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the routers."""
        model: nn.Module = kwargs["model"]
        self.routers: list[Any] = [
            module for module in model.modules() if isinstance(module, Router) and module.settable_k
        ]
        if not self.routers:
            raise ValueError(f"a schedule of k was asked for, but {type(model).__name__} has no router with a k to set")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the step's k."""
        k = round(self.k(state.global_step))
        for router in self.routers:
            if not 1 <= k <= router.num_experts:
                raise ValueError(
                    f"the schedule wants k={k} at step {state.global_step}, and a router has {router.num_experts} "
                    "experts; choose a schedule between 1 and that"
                )
            router.k = k


class SaveOnSignal(TrainerCallback):
    """On Ctrl-C, SIGTERM, SIGHUP or SIGUSR1: finish the step, save a checkpoint, end training and print how to resume.

    Those that the system has: Windows has neither SIGHUP nor SIGUSR1. A signal that is ignored, as `nohup` lets
    SIGHUP be, stays ignored. All ranks stop after the same step, whichever got the signal. A second signal ends the
    process at once.
    """

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")

    def __init__(self) -> None:
        self.received: int | None = None
        self.stopped = False
        self.before: dict[int, Any] = {}

    @property
    def signals(self) -> list[int]:
        """The signals that are handled."""
        known = [getattr(signal, name) for name in self.names if hasattr(signal, name)]
        return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Install the handlers in the main thread, the only one in which Python allows it."""
        self.received, self.stopped = None, False
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._receive) for number in self.signals}

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number
        self.restore()

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        while self.before:
            number, handler = self.before.popitem()
            signal.signal(number, handler)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, if any rank got a signal."""
        if anywhere(self.received is not None, args.device):
            control.should_save = control.should_training_stop = self.stopped = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print how to resume."""
        self.restore()
        if self.stopped and state.is_world_process_zero:
            name = "another process's signal" if self.received is None else signal.Signals(self.received).name
            kept = (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}").is_dir()
            saved = f"saved in {args.output_dir}" if kept else "which could not be saved: earlier checkpoints are kept"
            notify(
                f"moeify: stopped by {name} after step {state.global_step} of {state.max_steps}, {saved}; go on with "
                "train(resume_from_checkpoint=True) or, on the command line, --resume"
            )


class ProgressLine(TrainerCallback):
    """Steps, loss, balance, dead experts, tokens per second: in a terminal one line that changes, else about ten."""

    lines = 10

    def __init__(self, console: Console | None = None) -> None:
        self.console = Console(stderr=True) if console is None else console
        self.bar: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the line, if this is the first rank and a terminal."""
        self.shown = self.first = state.global_step
        self.began = time.monotonic()
        if self.console.is_terminal and state.is_world_process_zero:
            columns = (
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self.bar = Progress(*columns, console=self.console, transient=False)
            self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the latest numbers."""
        if not (logs and "loss" in logs and state.is_world_process_zero):
            return
        step, total = state.global_step, state.max_steps
        if self.bar is not None:
            self.bar.update(self.task, description=line(logs))
        elif step * self.lines // total > self.shown * self.lines // total:
            self.shown = step
            rest = (time.monotonic() - self.began) / (step - self.first) * (total - step)
            ends = f"  {rest:,.0f} s left" if step < total else ""
            notify(f"step {step}/{total}  {line(logs)}{ends}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the last line on screen."""
        self.close()

    def close(self) -> None:
        """Release the terminal."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def line(logs: dict[str, float]) -> str:
    """The main metrics of a log entry: loss, balance, dead experts and speed."""
    shown = {
        "loss": "loss {:.4f}",
        "balance": "balance {:.3f}",
        "dead_experts_worst": "dead {:.0f}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "samples_per_second": "{:,.0f} samples/s",
    }
    return "  ".join(form.format(logs[name]) for name, form in shown.items() if name in logs)
