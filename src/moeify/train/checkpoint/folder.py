"""The folder of a checkpoint on disk: complete or absent, checked before it is read, and free of pickle.

    checkpoint-120/
      model*.safetensors, config.json    the model, under its own parameter names, buffers included
      optimizer.safetensors, .json       the optimizer's tensors and numbers, by parameter name
      scheduler.json, trainer_state.json
      sparse.safetensors                 the load of every expert in the previous step
      balance.safetensors                the state of the controllers of expert load
      MANIFEST.json                      bytes and SHA-256 of every file

Of a model that is sharded over processes, each process writes what it holds, under the same names:

    checkpoint-120/
      model/shard-00001-*.safetensors    in the place of model*.safetensors
      optimizer/shard-00001-*            in the place of optimizer.safetensors
      MANIFEST.json                      also the shape and dtype of every tensor

A checkpoint is written to `checkpoint-120.tmp`, synced to disk, and renamed; only a complete one has its final name.
One to be deleted or replaced is renamed to `checkpoint-120.trash` first.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moeify.files import fingerprint, read_json, sync, write_text
from moeify.notices import notify
from moeify.train.checkpoint.shards import MODEL, OPTIMIZER
from moeify.train.checkpoint.stored import Stored

MANIFEST = "MANIFEST.json"
TEMPORARY, TRASH = ".tmp", ".trash"
_NAME = re.compile(r"checkpoint-\d{1,15}", re.ASCII)
_WEIGHTS = re.compile(r"(adapter_)?model.*\.safetensors$")


@contextmanager
def writing(final: Path) -> Generator[Path]:
    """Give a folder to write a checkpoint into, which gets its final name once everything is on disk.

    An exception inside removes what was written. A checkpoint that already has the final name is moved aside, and
    deleted once the new one is in its place: one of the two is complete at any time, and `recover` finds it.
    """
    folder = begun(final)
    try:
        yield folder
        seal(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    commit(folder, final)


def begun(final: Path) -> Path:
    """An empty folder for a checkpoint that is to get a final name."""
    folder = temporary(final)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def temporary(final: Path) -> Path:
    """Where a checkpoint lies until it is complete."""
    return final.with_name(final.name + TEMPORARY)


def commit(folder: Path, final: Path) -> None:
    """Give a sealed folder its final name."""
    old = final.with_name(final.name + TRASH)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(folder, final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(output: Path) -> None:
    """Clean up after a kill: a complete checkpoint without its final name gets it, all other leftovers are deleted.

    Call it only where no other process writes checkpoints."""
    leftovers = [path for suffix in (TEMPORARY, TRASH) for path in sorted(output.glob(f"checkpoint-*{suffix}"))]
    for path in leftovers:  # new ones before those that they replace
        final = path.with_suffix("")
        try:
            whole = _NAME.fullmatch(final.name) and not final.exists() and _fault(path) is None
        except Exception as error:  # it may be complete, and readable later
            notify(f"moeify: left {path} as it is, for it cannot be read ({type(error).__name__}: {error})")
            continue
        if whole:
            os.rename(path, final)
            notify(f"moeify: recovered {final}, which a kill had left without its name")
        else:
            shutil.rmtree(path, ignore_errors=True)


def set_aside(output: Path, after: int, *files: str) -> Path | None:
    """Move the checkpoints of later steps than `after` into a folder of their own, `earlier-1` or the next free number.

    Args:
        output: the folder of a run.
        after: the step that stays; -1 for none.
        files: further files of the folder to move, if there are such checkpoints.

    Returns:
        The new folder, None if there are no such checkpoints.
    """
    others = [path for path in checkpoints(output) if step_of(path) > after]
    if not others:
        return None
    aside = next(path for n in itertools.count(1) if not (path := output / f"earlier-{n}").exists())
    aside.mkdir()
    for path in [*others, *(output / name for name in files)]:
        if path.exists():
            os.rename(path, aside / path.name)
    sync(output)
    return aside


def seal(folder: Path, known: Mapping[str, dict[str, Any]] | None = None, **more: Any) -> None:
    """Sync all files of a folder to disk, and write the manifest.

    Args:
        folder: of a checkpoint.
        known: fingerprints of files that other processes have synced, by their path in the folder.
        more: further entries of the manifest.

    Raises:
        OSError: the disk is full, or a file of another process is not there.
    """
    known, files = known or {}, {}
    inside = sorted(folder.rglob("*"))
    for path in inside:
        name = path.relative_to(folder).as_posix()
        if name not in known:
            sync(path)
        if path.is_file():
            files[name] = known.get(name) or fingerprint(path)
    if absent := sorted(known.keys() - files.keys()):
        raise OSError(f"{absent[0]} was written by another process and is not in {folder}; save where all see it")
    write_text(folder / MANIFEST, json.dumps({"format": 1, "files": files} | more, indent=1))


def discard(folder: Path) -> None:
    """Delete a checkpoint so that no partial one keeps its name."""
    trash = folder.with_name(folder.name + TRASH)
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def fault(folder: Path) -> str | None:
    """Why a checkpoint is invalid, or None if every file matches the manifest."""
    try:
        return _fault(folder)
    except Exception as error:  # on any error of a damaged disk or file, an older checkpoint may still be valid
        return f"it cannot be read ({type(error).__name__}: {error})"


def _fault(folder: Path) -> str | None:
    try:
        manifest = read_json(folder / MANIFEST)
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never finished, or was written by another trainer"
    listed = manifest.get("files")
    if manifest.get("format") != 1 or not isinstance(listed, dict):
        return f"its {MANIFEST} has the format {manifest.get('format')!r}, and this version of moeify reads format 1"
    if (lacking := _lacking(set(listed))) is not None:
        return f"its manifest lacks {lacking}"
    root = folder.resolve()
    for name, expected in listed.items():
        if not (folder / name).resolve().is_relative_to(root):
            return f"its manifest names {name}, which lies outside"
        try:
            found = fingerprint(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        for what in ("bytes", "sha256"):
            if found[what] != expected[what]:
                return f"{name} has {what} {found[what]} instead of {expected[what]}"
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
    strange = sorted((there | {name for name in _STATE if (folder / name).exists()}) - listed.keys())
    return f"{strange[0]} is not in its manifest" if strange else _fault_of_shards(folder, manifest)


def _fault_of_shards(folder: Path, manifest: dict[str, Any]) -> str | None:
    """What of the tensors in a manifest is in no shard, or the other way round."""
    parts = {name.partition("/")[0] for name in manifest["files"] if name.endswith(".safetensors") and "/" in name}
    tensors = manifest.get("tensors", {})
    for part in sorted(parts & {MODEL, OPTIMIZER} | tensors.keys()):
        stored = Stored.of(sorted((folder / part).glob("*.safetensors")))
        if (reason := stored.fault(tensors.get(part, {}))) is not None:
            return reason
    return None


def _lacking(listed: set[str]) -> str | None:
    """A file that every checkpoint has, and that a manifest does not list."""
    if "trainer_state.json" not in listed:
        return "trainer_state.json"
    sharded = any(name.startswith(f"{MODEL}/") for name in listed)
    if not sharded and not any(re.match(_WEIGHTS, name.rpartition("/")[2]) for name in listed):
        return "the weights"
    optimizer = set(_STATE) - {"scaler.json"} - ({"optimizer.safetensors"} if sharded else set())
    return next(iter(sorted(optimizer - listed)), None) if optimizer & listed else None


_STATE = (
    "optimizer.json", "optimizer.safetensors", "scheduler.json", "sparse.safetensors", "balance.safetensors",
    "scaler.json",
)  # fmt: skip
"""Files of a checkpoint besides the model: all of them, or none (`save_only_model`); only fp16 has a scaler."""


def checkpoints(output: Path) -> list[Path]:
    """All checkpoints of a run, newest first, valid or not."""
    found = [path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name) and _may_be_folder(path)]
    return sorted(found, key=step_of, reverse=True)


def _may_be_folder(path: Path) -> bool:
    try:
        return path.is_dir() or path.is_symlink()
    except OSError:  # a device that fails
        return True


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest(output: Path) -> Path:
    """The newest valid checkpoint of a run; prints which newer ones are invalid, and why.

    Raises:
        FileNotFoundError: there is none.
    """
    rejected = []
    for path in checkpoints(output):
        reason = fault(path)
        if reason is None:
            return path
        rejected.append(f"{path.name}: {reason}")
        notify(f"moeify: rejected {rejected[-1]}")
    raise FileNotFoundError(
        f"no checkpoint in {output} can be trusted"
        + (f" ({'; '.join(rejected)})" if rejected else ", it holds none")
        + "; to start afresh, call train() without resume_from_checkpoint"
    )


def rotate(written: list[Path], limit: int | None, best: str | None) -> None:
    """Keep the newest `limit` checkpoints of a run, and its best one at any age.

    Args:
        written: the checkpoints of this run, oldest first; those that are deleted leave the list.
        limit: how many to keep; None for all.
        best: the best checkpoint, which is always kept.
    """
    if not limit or limit < 1:
        return
    keep = {Path(best).resolve()} if best else set()
    others = [path for path in written if path.resolve() not in keep]
    for path in others[: -max(1, limit - len(keep))]:
        written.remove(path)
        try:
            discard(path)
        except OSError as error:
            notify(f"moeify: the old {path} could not be deleted: {error}")
