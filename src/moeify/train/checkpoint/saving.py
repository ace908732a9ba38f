"""A trainer's checkpoints: when they are written, which one is resumed from, and which ones are deleted."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_callback import ExportableState

from moeify import ranks
from moeify.files import read_json, read_tensors, share_tensors, write_tensors
from moeify.folders import RUN_LOCK, locked, replacing_files
from moeify.notices import notify
from moeify.origin import Origin
from moeify.store import save
from moeify.train.checkpoint import state
from moeify.train.checkpoint.adapters import saves_adapters, write_adapters
from moeify.train.checkpoint.folder import (
    checkpoints,
    fault,
    newest,
    recover,
    rotate,
    set_aside,
    step_of,
    writing,
)  # fmt: skip
from moeify.train.checkpoint.sharded import parts_of
from moeify.train.checkpoint.shards import is_sharded
from moeify.train.checkpoint.together import group_of_checkpoints, warn_of_shared_store, write_together
from moeify.train.run_log import LOG

_Trainer: Any = object  # at run time the mixin is combined with a trainer of transformers


class Saving(_Trainer):
    """Writes and reads a trainer's checkpoints in the format of `moeify.train.checkpoint.folder`.

    transformers' own way loses the experts of its MoE models: it saves them under the names of the hub and reads them
    back under the names of the model, with a warning only.
    """

    failures = 0
    saved: Path | None = None
    written: list[Path]
    _running: tuple[Path, Future[None]] | None = None

    def _checkpoint_folder(self, step: int, trial: Any = None) -> Path:
        return Path(self._get_output_dir(trial)) / f"checkpoint-{step}"

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write a checkpoint of the current step; a full disk is survived twice, previous checkpoints are untouched.

        Raises:
            OSError: the third failure in a row.
        """
        self._refuse_sharded()
        self._await_save()
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        final = self._checkpoint_folder(self.state.global_step, trial)
        if self.state.best_global_step:
            best = self._checkpoint_folder(self.state.best_global_step, trial)
            if best == final or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        if final != self.saved:
            if self.sparse.background_save or is_sharded(self.model):
                self._save_together(final)
            elif self.args.should_save:
                self._save_alone(final)
        if ranks.anywhere(self.failures == 3, self.args.device):
            raise OSError("no checkpoint could be saved three times in a row; make room, or choose another output_dir")
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._await_save()
            self._push_from_checkpoint(str(final))

    def _save_alone(self, final: Path) -> None:
        try:
            with writing(final) as folder:
                self._write(folder)
            self._saved(final)
        except OSError as error:
            self._failed(final, error)

    def _save_together(self, final: Path) -> None:
        """Save by all processes, in the background if asked for; the next save learns how it ended."""
        background, group = self.sparse.background_save, group_of_checkpoints(self.args.ddp_timeout)
        tensors, numbers = None, None
        if not self.args.save_only_model:
            tensors, numbers = state.optimizer_state(bare(self.optimizer), self.model)
        parts = parts_of(self.model, tensors, group=group, copy=background)

        def write_others(folder: Path) -> None:
            if hasattr(config := getattr(self.model, "config", None), "save_pretrained"):
                config.save_pretrained(folder)
            if numbers is not None:
                state.write_json(folder / f"{state.OPTIMIZER}.json", numbers)
            self._write_others(folder)

        try:
            self._running = final, write_together(final, parts, write_others, group=group, background=background)
        except OSError as error:
            self._failed(final, error)
        if not background:
            self._await_save()

    def _await_save(self) -> None:
        """Wait for the save that runs in the background, if one does."""
        if self._running is None:
            return
        (final, done), self._running = self._running, None
        try:
            done.result()
            self._saved(final)
        except OSError as error:
            self._failed(final, error)

    def _saved(self, final: Path) -> None:
        self.failures, self.saved = 0, final
        self.written = [path for path in self.written if path != final] + [final]
        if self.args.should_save:
            rotate(self.written, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _failed(self, final: Path, error: OSError) -> None:
        self.failures += 1
        if self.args.should_save:
            notify(f"moeify: {final.name} could not be saved ({error}); earlier checkpoints are untouched")

    def _write(self, folder: Path) -> None:
        state.save_weights(self.model, folder)
        if not self.args.save_only_model:
            state.save_optimizer(bare(self.optimizer), self.model, folder)
        self._write_others(folder)

    def _write_others(self, folder: Path) -> None:
        """Write all but the tensors of model and optimizer."""
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if not self.args.save_only_model:
            state.write_json(folder / state.SCHEDULER, self.lr_scheduler.state_dict())
            write_tensors(folder / state.SPARSE, self._step_loss.assigned)
            state.save_balance(self._control, self.sparse.targets, folder)
            if (scaler := getattr(self.accelerator, "scaler", None)) is not None:
                state.write_json(folder / "scaler.json", scaler.state_dict())
        kept = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name, value = type(callback).__name__, callback.state()
                kept[name] = [*kept[name], value] if isinstance(kept.get(name), list) else value
        self.state.save_to_json(str(folder / "trainer_state.json"))

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Let no other process train into the output folder meanwhile; the first process holds the lock for all.

        Raises:
            OSError: another process does.
        """
        with ExitStack() as held:
            with ranks.failing_together(self.args.device):
                if self.is_world_process_zero() and self.hp_search_backend is None:
                    held.enter_context(locked(Path(self.args.output_dir), RUN_LOCK, "is training"))
            try:
                yield
            finally:
                self._await_save()

    def _begin_run(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The checkpoint to resume from, if any; later ones and those of other runs are moved aside."""
        output = Path(self.args.output_dir)
        warn_of_shared_store()
        if self.is_world_process_zero():
            recover(output)
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint) if resume_from_checkpoint else None
        step = -1
        if checkpoint is not None and checkpoint.parent.resolve() == output.resolve():
            step = read_json(checkpoint / "trainer_state.json")["global_step"]
        if self.is_world_process_zero():
            found = checkpoints(output)
            if aside := set_aside(output, step, *([] if checkpoint else [LOG])):
                begins = f"goes on from {checkpoint.name}" if checkpoint else "starts afresh"
                notify(
                    f"moeify: {output} holds checkpoints of an earlier run up to {found[0].name}; this run {begins}, "
                    f"and those of later steps are moved to {aside}"
                )
        self.accelerator.wait_for_everyone()
        self.written = checkpoints(output)[::-1]
        return None if checkpoint is None else str(checkpoint)

    def _checkpoint_to_resume(self, where: str | bool) -> Path:
        """The checkpoint to resume from; the first process chooses for all."""
        folder = Path(self.args.output_dir if isinstance(where, bool) else where)
        if not isinstance(where, bool) and not checkpoints(folder):
            with ranks.failing_together(self.args.device):
                if self.is_world_process_zero() and (reason := fault(folder)) is not None:
                    raise FileNotFoundError(f"cannot go on from {folder}: {reason}")
            return folder
        choice = torch.tensor(-1, device=self.args.device)
        failure: FileNotFoundError | None = None
        if self.is_world_process_zero():
            try:
                choice.fill_(step_of(newest(folder)))
            except FileNotFoundError as error:
                failure = error
        if ranks.broadcast(choice) < 0:
            raise failure or FileNotFoundError(f"the first process found no checkpoint in {folder} that can be trusted")
        return folder / f"checkpoint-{int(choice)}"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restore every tensor of the model, experts included, or none."""
        self._refuse_sharded()
        state.refuse_frozen(self.model, Path(resume_from_checkpoint))
        state.load_model(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Restore the best model of the run, experts included."""
        self._await_save()
        best = Path(self.state.best_model_checkpoint)
        if (reason := fault(best)) is not None:
            raise ValueError(f"the best model cannot be loaded from {best}: {reason}")
        state.load_model(self.model, best)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if not (folder / state.SCHEDULER).is_file():
            notify(f"moeify: {folder.name} holds the model only (save_only_model), optimizer and schedule begin anew")
            return
        state.load_optimizer(bare(self.optimizer), self.model, folder)
        state.load_scheduler(self.lr_scheduler, bare(self.optimizer), self.model, folder)
        self._step_loss.assigned = read_tensors(folder / state.SPARSE)
        state.load_balance(self._control, self.sparse.targets, folder)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (file := Path(checkpoint) / "scaler.json").is_file():
            self.accelerator.scaler.load_state_dict(read_json(file))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to restore: random numbers are a function of (seed, step, rank)."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save a finished model for `moeify.store.load` if `sparsify` made it, and else as transformers does.

        Of a model with PEFT adapters, these are saved.
        """
        if saves_adapters(self.model):
            if self.args.should_save:
                with replacing_files(Path(self.args.output_dir if output_dir is None else output_dir)) as stage:
                    write_adapters(self.model, stage.new)
            return
        if Origin.of(self.model).recipe is None:
            super()._save(output_dir, state_dict)
            if self.args.should_save:
                share_tensors(self.args.output_dir if output_dir is None else output_dir)
            return
        sharded = is_sharded(self.model)
        if sharded or self.args.should_save:
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            with ranks.failing_together(self.args.device) if sharded else nullcontext():
                save(self.model, folder)
            if self.processing_class is not None and self.args.should_save:
                self.processing_class.save_pretrained(folder)

    def _refuse_sharded(self) -> None:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2):
            raise ValueError(
                "checkpoints of DeepSpeed and of the first FSDP are not supported, whose parameters have other names; "
                "use FSDP2 (fsdp_config={'version': 2}) or DistributedConfig, or pass save_strategy='no'"
            )


def bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
