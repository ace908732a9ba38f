"""`moeify inspect`: show the routing of a model, a trace or a training run as one HTML file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moeify.cli import options as o
from moeify.cli.inputs import Amount, load_source, read_inputs
from moeify.cli.trace import Probe

if TYPE_CHECKING:
    from moeify.inspect.report import Report


def inspect(
    source: Annotated[Path, typer.Argument(help="The folder of a model or of a run of moeify train, or a trace")],
    data: o.Text = None,
    probe: Probe = None,
    output: Annotated[Path | None, typer.Option(help="The HTML file", show_default="inspect.html beside it")] = None,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of 128 tokens, or a run's samples, of each domain")] = 16,
    generate: Annotated[int, typer.Option(min=0, help="Tokens to write after each block, to see decoding apart")] = 0,
    measure: Annotated[bool, typer.Option(help="Also compare experts, and mask some to see the loss rise")] = True,
    stream: o.Stream = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print numbers and advice as JSON")] = False,
) -> None:
    """Show which experts a model uses for what, and what to do about it, in one HTML file that works offline."""
    from moeify.folders import model_folder

    folder = model_folder(source)
    if (folder / "config.json").is_file() and stream:
        made = _of_streamed(folder, source, (data, probe), blocks, generate)
    elif (folder / "config.json").is_file():
        made = _of_model(folder, source, (data, probe), blocks, generate, measure)
    else:
        made = _of_trace(source)
    output = (source if source.is_dir() else source.parent) / "inspect.html" if output is None else output
    made.write(output)
    print(json.dumps(made.to_dict(), indent=1)) if as_json else _say(made, output)


def _of_trace(file: Path) -> Report:
    from moeify.inspect.formats import read_trace
    from moeify.inspect.report import report

    if not file.exists():
        raise FileNotFoundError(f"there is no model, run or trace {file}")
    return report(read_trace(file), title=file.name)


def _of_model(
    folder: Path, run: Path, inputs: tuple[str | None, str | None], per_domain: int, generate: int, measure: bool
) -> Report:
    from moeify.inspect.report import report
    from moeify.tasks.models import load_model
    from moeify.train.checkpoint.folder import checkpoints, step_of

    model = load_source(str(run))
    batches, tokenizer = read_inputs(run, *inputs, Amount(per_domain=per_domain), labels=not generate)
    training = next((path for path in sorted(run.glob("sparse-*")) if path.is_dir()), run)
    log = training / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return report(
        model, batches, title=run.resolve().name, tokenizer=tokenizer, generate=generate, measure=measure,
        checkpoints={step_of(path): load_model(path) for path in checkpoints(training)},
        log=[json.loads(line) for line in lines],
    )  # fmt: skip


def _of_streamed(
    folder: Path, run: Path, inputs: tuple[str | None, str | None], per_domain: int, generate: int
) -> Report:
    """The page of the trace of a model whose weights stay on disk; they are read once, for all blocks together."""
    from moeify.inspect.capture import capture
    from moeify.inspect.report import report
    from moeify.inspect.streamed import stream

    all_at_once = Amount(per_domain=per_domain, batch=sys.maxsize)
    batches, tokenizer = read_inputs(run, *inputs, all_at_once, labels=False)
    trace = capture(stream(folder), batches, tokenizer=tokenizer, generate=generate)
    return report(trace, title=run.resolve().name)


def _say(made: Report, output: Path) -> None:
    """Print the advice in the terminal, the most urgent first."""
    print(f"{made.title}: " + ", ".join(f"{name} {value}" for name, value in made.facts.items()))
    for level, word in (("act", "ACT"), ("look", "improve")):
        for panel in made.panels:
            if (advice := panel.advice).level == level:
                print(f"{word:8} {panel.title}: {advice.finding}\n         -> {advice.action}")
    for level in ("fine", "unknown"):
        if titles := [panel.title for panel in made.panels if panel.advice.level == level]:
            print(f"{level:8} {', '.join(titles)}")
    print(f"open {output}")
