"""`moeify inspect`: show the routing of a model, a trace or a training run as one HTML file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeify.cli import options as o
from moeify.cli.trace import Probe

if TYPE_CHECKING:
    from moeify.inspect.report import Report

_LENGTH, _BATCH = 128, 8


def inspect(
    source: Annotated[Path, typer.Argument(help="The folder of a model or of a run of moeify train, or a trace")],
    data: o.Text = None,
    probe: Probe = None,
    output: Annotated[Path | None, typer.Option(help="The HTML file", show_default="inspect.html beside it")] = None,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of 128 tokens that are read of each domain")] = 16,
    generate: Annotated[int, typer.Option(min=0, help="Tokens to write after each block, to see decoding apart")] = 0,
    measure: Annotated[bool, typer.Option(help="Also compare experts, and mask some to see the loss rise")] = True,
    stream: o.Stream = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print numbers and advice as JSON")] = False,
) -> None:
    """Show which experts a model uses for what, and what to do about it, in one HTML file that works offline."""
    from moeify.folders import model_folder

    folder = model_folder(source)
    if (folder / "config.json").is_file() and stream:
        made = _of_streamed(folder, source, data, blocks, generate)
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
    from moeify.cli.trace import load_source, read_probes
    from moeify.inspect.report import report
    from moeify.tasks.models import load_model, saved_tokenizer
    from moeify.train.checkpoint.folder import checkpoints, step_of

    data, probe = inputs
    model = load_source(str(run))
    tokenizer = None if probe else saved_tokenizer(folder)
    batches = read_probes(probe) if probe else _batches(tokenizer, data, per_domain)
    training = next((path for path in sorted(run.glob("sparse-*")) if path.is_dir()), run)
    log = training / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return report(
        model, batches, title=run.resolve().name, tokenizer=tokenizer, generate=generate, measure=measure,
        checkpoints={step_of(path): load_model(path) for path in checkpoints(training)},
        log=[json.loads(line) for line in lines],
    )  # fmt: skip


def _of_streamed(folder: Path, run: Path, data: str | None, per_domain: int, generate: int) -> Report:
    """The page of the trace of a model whose weights stay on disk; they are read once, for all blocks together."""
    import torch

    from moeify.inspect.capture import capture
    from moeify.inspect.report import report
    from moeify.inspect.streamed import stream
    from moeify.tasks.models import saved_tokenizer

    tokenizer = saved_tokenizer(folder)
    batches = _batches(tokenizer, data, per_domain)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    domains = [batch["domain"] for batch in batches for _ in batch["input_ids"]]
    together = [{"input_ids": ids, "domain": domains}]
    trace = capture(stream(folder), together, tokenizer=tokenizer, generate=generate)
    return report(trace, title=run.resolve().name)


def _batches(tokenizer: Any, data: str | None, per_domain: int) -> list[dict[str, Any]]:
    """Batches of one domain each."""
    import torch

    from moeify.data.blocks import blocks
    from moeify.data.corpus import build_corpus
    from moeify.data.text import read_texts

    _, held_out = blocks(build_corpus() if data is None else read_texts(data), tokenizer, _LENGTH)
    members: dict[str, list[int]] = {}
    for i in range(len(held_out)):
        members.setdefault(held_out.domain_of(i), []).append(i)
    found = []
    for domain, places in members.items():
        kept = places[:: max(1, len(places) // per_domain)][:per_domain]
        for start in range(0, len(kept), _BATCH):
            ids = torch.stack([held_out[i]["input_ids"] for i in kept[start : start + _BATCH]])
            found.append({"input_ids": ids, "domain": domain})
    return found


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
