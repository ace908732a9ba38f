"""`moeify doctor`: which kernels will run; with `--model` or `--log`, what is wrong with a model or a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeify.cli import options as o

if TYPE_CHECKING:
    from moeify.inspect import Diagnosis

STATUS = {"healthy": 0, "findings": 1, "unknown": 3}
"""The exit status of a diagnosis; 2 is bad input."""


def doctor(
    model: Annotated[
        Path | None,
        typer.Option(
            help="A saved sparse model, the folder of a run, or an MoE of transformers: say what is wrong with it",
            show_default="describe this machine",
        ),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            help="A run, or its metrics.jsonl or trainer_state.json: say what the log of the training shows",
            show_default="no log",
        ),
    ] = None,
    data: o.Text = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to run it on, at most")] = 16384,
    length: Annotated[int, typer.Option(min=2, help="Tokens per block")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Blocks per batch")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Write the diagnosis as JSON")] = False,
) -> None:
    """Say which kernels will run on this machine; with `--model` or `--log`, what is wrong with a model or a training.

    With either, the exit status is 0 if nothing was found, 1 if something was, and 3 if some checks could not decide.
    """
    if log is not None and (model is not None or data is not None):
        raise ValueError("--log diagnoses a training by its log alone; name a model and its data in another call")
    if log is not None:
        diagnosis = _diagnose_log(log)
    elif model is not None:
        diagnosis = _diagnose(model, data, tokens, length, batch)
    elif data is not None or as_json:
        raise ValueError("--data and --json are for a diagnosis; name the model by --model, or a run by --log")
    else:
        from moeify.cli.machine import describe_machine

        describe_machine()
        return
    print(json.dumps(diagnosis.to_dict(), indent=2) if as_json else diagnosis)
    if status := STATUS[diagnosis.status]:
        raise typer.Exit(status)


def _diagnose_log(run: Path) -> Diagnosis:
    from moeify.inspect import diagnose_log, read_log

    return diagnose_log(read_log(run))


def _diagnose(model: Path, data: str | None, tokens: int, length: int, batch: int) -> Diagnosis:
    from moeify.folders import model_folder
    from moeify.inspect import diagnose
    from moeify.tasks.models import load_model, saved_tokenizer

    folder = model_folder(model)
    sparse = load_model(folder)
    return diagnose(sparse, _batches(data, saved_tokenizer(folder), tokens, length, batch))


def _batches(data: str | None, tokenizer: Any, tokens: int, length: int, batch: int) -> list[dict[str, Any]]:
    """Blocks of text, spread evenly over its domains: held-out ones, and where these are too few others too."""
    import torch

    from moeify.data.blocks import blocks
    from moeify.data.corpus import build_corpus
    from moeify.data.text import read_texts

    training, heldout = blocks(build_corpus() if data is None else read_texts(data), tokenizer, length)
    found: list[torch.Tensor] = []
    for part in (heldout, training):
        count = min(len(part), max(1, tokens // length) - len(found))
        found += [part[int(place)]["input_ids"] for place in torch.linspace(0, len(part) - 1, count).round()]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids} for ids in torch.stack(found)[order].split(batch)]
