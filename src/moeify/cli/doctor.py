"""`moeify doctor`: which kernels will run; with `--model` or `--log`, what is wrong with a model or a training."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeify.cli import options as o
from moeify.cli.inputs import Amount, load_source, read_inputs
from moeify.cli.trace import Probe

if TYPE_CHECKING:
    from moeify.inspect import Diagnosis

STATUS = {"healthy": 0, "findings": 1, "unknown": 3}
"""The exit status of a diagnosis; 2 is bad input."""


def doctor(
    model: Annotated[
        Path | None,
        typer.Option(
            help="A saved sparse model, a run with its log, or an MoE of transformers: say what is wrong with it",
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
    probe: Probe = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to run it on, at most")] = 16384,
    length: Annotated[int, typer.Option(min=2, help="Tokens per block")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Blocks per batch")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Write the diagnosis as JSON")] = False,
) -> None:
    """Say which kernels will run on this machine; with `--model` or `--log`, what is wrong with a model or a training.

    With either, the exit status is 0 if nothing was found, 1 if something was, and 3 if some checks could not decide.
    """
    if log is not None and not model is data is probe is None:
        raise ValueError("--log diagnoses a training by its log alone; --model RUN reads the log of the run as well")
    if log is not None:
        diagnosis = _diagnose_log(log)
    elif model is not None:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():  # lines of progress are no JSON
            diagnosis = _diagnose(model, data, probe, Amount(tokens=tokens, length=length, batch=batch))
    elif as_json or not data is probe is None:
        raise ValueError("--data, --probe and --json are for a diagnosis; name the model by --model, or a run by --log")
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


def _diagnose(model: Path, data: str | None, probe: str | None, amount: Amount) -> Diagnosis:
    """The diagnosis of a model, and of the log of its training where its folder has one."""
    from moeify.inspect import diagnose

    batches, _ = read_inputs(model, data, probe, amount)
    found = diagnose(load_source(str(model)), batches)
    with suppress(FileNotFoundError):
        found = found.with_log(_diagnose_log(model))
    return found
