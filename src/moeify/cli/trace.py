"""`moeify trace`: record which experts a model sends every token to, or convert such a trace into another format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeify.cli import options as o
from moeify.cli.inputs import Amount, load_source, read_inputs

if TYPE_CHECKING:
    from moeify.inspect.trace import Trace


Source = Annotated[
    str, typer.Argument(help="A saved sparse model, the folder of a run, an MoE of transformers; or a trace")
]
Probe = Annotated[
    str | None,
    typer.Option(
        help="Other inputs: FILE.safetensors with tensors by the names of the model's arguments, or FILE.py:FUNCTION, "
        "which returns one input or a list of them",
        show_default="text",
    ),
]
Generate = Annotated[int, typer.Option(min=0, help="Tokens that the model decodes after every excerpt")]
Architecture = Annotated[
    str | None, typer.Option(help="The class of transformers that loads the model", show_default="as its config says")
]
FormatName = Annotated[
    str | None,
    typer.Option(
        help="The format: safetensors, jsonl, megatron, llama.cpp, bigmoeonedge or vllm", show_default="the ending's"
    ),
]
NumExperts = Annotated[
    int | None,
    typer.Option(
        min=1, help="Experts per layer, for a trace whose format does not tell them", show_default="what occurs in it"
    ),
]
K = Annotated[
    int | None,
    typer.Option(min=1, help="Experts per token, for a trace of llama.cpp", show_default="by the order of rows"),
]


def trace(
    source: Source,
    output: Annotated[Path, typer.Option(help="The file to write; its ending tells the format")],
    data: o.Text = None,
    probe: Probe = None,
    tokens: Annotated[int, typer.Option(min=1, help="About how many tokens of text to read")] = 8192,
    length: Annotated[int, typer.Option(min=2, help="Tokens per excerpt")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Excerpts at once")] = 8,
    generate: Generate = 0,
    scores: Annotated[bool, typer.Option(help="Keep the scores of all experts, where they fit 1 GiB")] = True,
    logits: Annotated[bool, typer.Option("--logits", help="Keep the logits of all experts too")] = False,
    architecture: Architecture = None,
    device: o.Device = None,
    stream: o.Stream = False,
    format: FormatName = None,
    experts: NumExperts = None,
    k: K = None,
) -> None:
    """Record which experts a model sends every token to, or convert the trace of another program."""
    from moeify.folders import model_folder
    from moeify.inspect.capture import capture
    from moeify.inspect.formats import format_to_write, read_trace, recognised, write_trace

    format_to_write(output, format)  # a model would run long before it turns out that there is none
    path = Path(source)
    holds_model = (model_folder(path) / "config.json").is_file()
    if path.is_file() or (path.is_dir() and not holds_model and recognised(path) is not None):
        found = read_trace(path, num_experts=experts, k=k)
    else:
        model = _streamed(source, architecture) if stream else load_source(source, architecture, device)
        amount = Amount(tokens=tokens, length=length, batch=max(batch, tokens // length) if stream else batch)
        batches, tokenizer = read_inputs(source, data, probe, amount, labels=not (generate or stream))
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and not generate:
            batches = [_with_decoder(each) for each in batches]
        found = capture(model, batches, generate=generate, scores=scores, logits=logits, tokenizer=tokenizer)
        found.header["model"] = source
    write_trace(found, output, format)
    print(f"moeify: {_described(found)}\nmoeify: in {output}, {output.stat().st_size / 2**20:,.1f} MiB")


def _streamed(source: str, architecture: str | None) -> Any:
    from moeify.folders import model_folder
    from moeify.inspect.streamed import stream

    folder = model_folder(Path(source))
    return stream(folder if folder.is_dir() else source, architecture=architecture)


def _with_decoder(batch: Any) -> Any:
    """The batch; a decoder beside an encoder that is given nothing reads what the encoder reads."""
    if not isinstance(batch, dict) or "input_ids" not in batch or {"labels", "decoder_input_ids"} & batch.keys():
        return batch
    return batch | {"decoder_input_ids": batch["input_ids"]}


def _described(found: Trace) -> str:
    """A trace in a line: layers, experts, tokens."""
    from moeify.inspect.trace import DECODE

    experts = sorted({layer.num_experts for layer in found})
    parts = []
    for table in found.tables:
        decoded = 0 if table.phase is None else int((table.phase == DECODE).sum())
        parts.append(f"{len(table):,} tokens" + (f", {decoded:,} of them decoded" if decoded else ""))
    return f"{len(found.layers)} layers of {' or '.join(f'{e:,}' for e in experts)} experts, {' and '.join(parts)}"
