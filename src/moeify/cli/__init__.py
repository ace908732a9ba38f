"""The command line: one file per verb."""

from __future__ import annotations

import os
import sys

import typer

from moeify.cli import compare, doctor, generate, sparsify, train
from moeify.evaluate.run import Stopped

app = typer.Typer(
    name="moeify",
    help="Make any transformer sparse: convert it to a mixture of experts, train it, compare it with its dense twin.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.train)
app.command("compare")(compare.compare)
app.command("sparsify")(sparsify.sparsify)
app.command("generate")(generate.generate)
app.command("recipes")(sparsify.list_recipes)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line; bad input ends in one line, and `MOEIFY_TRACEBACK=1` shows where it came from."""
    try:
        app()
    except (ValueError, OSError, ImportError, FloatingPointError, Stopped, KeyboardInterrupt) as error:
        if os.environ.get("MOEIFY_TRACEBACK") == "1":
            raise
        if isinstance(error, Stopped | KeyboardInterrupt):
            print(f"moeify: {error or 'interrupted'}", file=sys.stderr)
            sys.exit(130)
        print(f"moeify: error: {error}", file=sys.stderr)
        sys.exit(2)
