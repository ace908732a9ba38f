"""The command line: one file per verb."""

from __future__ import annotations

import logging
import sys

import typer

from moeify import env
from moeify.cli import compare, doctor, generate, sparsify, train
from moeify.evaluate.run import Stopped

app = typer.Typer(
    name="moeify",
    help="Make any transformer sparse: convert it to a mixture of experts, train it, compare it with its dense twin.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("train")(train.train)
app.command("compare")(compare.compare)
app.command("sparsify")(sparsify.sparsify)
app.command("generate")(generate.generate)
app.command("recipes")(sparsify.list_recipes)
app.command("doctor")(doctor.doctor)

(UsageError,) = typer.BadParameter.__bases__  # of click, or of the copy of it that newer versions of typer bring


def main() -> None:
    """Run the command line; bad input ends in one line, and `MOEIFY_TRACEBACK=1` shows where it came from."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every attempt to reach the hub
    try:
        if app(sys.argv[1:] or ["--help"], standalone_mode=False) == 130:
            raise KeyboardInterrupt  # which typer made a number of
    except (UsageError, ValueError, OSError, ImportError, FloatingPointError) as error:
        _end(error, "moeify: error: ", 2)
    except (Stopped, typer.Abort, KeyboardInterrupt) as error:
        _end(error, "moeify: ", 130)


def _end(error: BaseException, prefix: str, code: int) -> None:
    if env.TRACEBACK.is_on:
        raise error
    message = error.format_message() if isinstance(error, UsageError) else str(error)
    print(prefix + (" ".join(message.split()) or "interrupted"), file=sys.stderr)
    sys.exit(code)
