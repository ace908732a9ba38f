"""The command line: one file per command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import logging
import sys
from typing import Any

import typer

from moeify import env
from moeify.cli import (
    compare,
    doctor,
    export,
    generate,
    init,
    inspect,
    plan,
    recipes,
    reproduce,
    sparsify,
    threads,
    trace,
    train,
    verify,
    watch,
)

app = typer.Typer(
    name="moeify",
    help="Make any transformer sparse: convert it to a mixture of experts, train it, compare with a dense baseline.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("train")(train.Train)  # typer makes it of the options, and `main` runs it
app.command("compare")(compare.Compare)
app.command("sparsify")(sparsify.sparsify)
app.command("generate")(generate.generate)
app.command("verify")(verify.verify)
app.command("export")(export.export)
app.command("inspect")(inspect.inspect)
app.command("recipes")(recipes.recipes)
app.command("doctor")(doctor.doctor)
app.command("watch")(watch.watch)
app.command("trace")(trace.trace)
app.command("plan")(plan.plan)
app.command("init")(init.init)
app.command("reproduce", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    reproduce.reproduce
)

(UsageError,) = typer.BadParameter.__bases__  # of click, or of the copy of it that newer versions of typer bring


def main() -> None:
    """Run the command line; bad input ends in one line, and `MOEIFY_TRACEBACK=1` shows where it came from."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every attempt to reach the hub
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a locale without UTF-8 cannot encode everything that models write
    try:
        _run(sys.argv[1:] or ["--help"])
    except (UsageError, ValueError, OSError, ImportError, FloatingPointError) as error:
        _end(error, "moeify: error: ", 2)
    except (typer.Abort, KeyboardInterrupt) as error:
        _end(error, "moeify: ", 130)


def _run(arguments: list[str]) -> None:
    threads.prepare()
    ended: Any = app(arguments, standalone_mode=False)
    if ended == 130:
        raise KeyboardInterrupt  # which typer made a number of
    if isinstance(ended, int):
        sys.exit(ended)
    if isinstance(ended, train.Train):
        ended.run()


def _end(error: BaseException, prefix: str, code: int) -> None:
    if env.TRACEBACK.is_on:
        raise error
    message = error.format_message() if isinstance(error, UsageError) else str(error)
    print(prefix + (" ".join(message.split()) or "interrupted"), file=sys.stderr)
    sys.exit(code)
