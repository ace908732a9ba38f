"""`moeify export`: write a saved sparse model for another program, and compare what that program computes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moeify.export import Exporter


def export(
    model: Annotated[Path, typer.Argument(help="A saved sparse model, the folder of a run, or an MoE of transformers")],
    to: Annotated[
        str, typer.Option(help="The program to write for: transformers, gguf, mlx, onnx or openvino")
    ] = "transformers",
    output: Annotated[
        Path | None, typer.Option(help="The new folder", show_default="beside the model, named after the target")
    ] = None,
    as_class: Annotated[
        str | None,
        typer.Option(
            "--class",
            help="The class of transformers or architecture of llama.cpp, such as mixtral",
            show_default="the closest",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--type", help="Weights of a GGUF file: f32, f16, bf16, q8_0 or q4_0", show_default="the model's"),
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option(
            help="An input of the model, for onnx and openvino: FILE.safetensors or FILE.py:FUNCTION",
            show_default="guessed",
        ),
    ] = None,
) -> None:
    """Write a sparse model for another program, which does not need moeify."""
    from moeify import export
    from moeify.folders import model_folder
    from moeify.tasks.models import load_model

    folder = model_folder(model)
    source, tokenizer = load_model(folder), _tokenizer(folder)
    output = folder.parent / f"{folder.name}-{to}" if output is None else output
    done = export.write(source, output, to, tokenizer=tokenizer, exporter=_exporter(to, as_class, weights, probe))
    print(
        "\n".join(
            [f"{done.folder}: {done.notes[0]}", *(f"  {note}" for note in done.notes[1:]), str(done.verification)]
        )
    )


def _exporter(to: str, as_class: str | None, weights: str | None, probe: str | None) -> Exporter:
    from moeify import export
    from moeify.cli.options import choose_probe

    graphs = {"onnx": export.OnnxFolder, "openvino": export.OpenVinoFolder}
    if probe is not None and to not in graphs:
        raise ValueError(f"--probe is for --to onnx and openvino, not {to}")
    if to == "gguf":
        return export.GgufFile(weights, as_class)
    if weights is not None:
        raise ValueError(f"--type is for --to gguf, not {to}")
    if to == "transformers":
        return export.HfFolder(as_class)
    if as_class is not None:
        raise ValueError(f"--class is for --to transformers and gguf, not {to}")
    return graphs[to](choose_probe(probe)) if to in graphs else export.find_exporter(to)


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of transformers in the folder of a model, None if there is none."""
    from moeify.tasks.models import load_tokenizer

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    return load_tokenizer(str(folder)) if any((folder / name).is_file() for name in names) else None
