"""`moeify generate`: continue a prompt with a saved sparse model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[Path, typer.Argument(help="A saved sparse model, or the folder of a run")],
    prompt: Annotated[str, typer.Option(help="How the text begins")] = "def ",
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write")] = 200,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token, 1 samples as trained")] = 0.8,
    seed: Annotated[int, typer.Option(help="Seed of the sampling")] = 0,
) -> None:
    """Continue a prompt with a saved sparse model."""
    from moeify.folders import model_folder
    from moeify.store import load
    from moeify.tasks.models import sample, saved_tokenizer

    folder = model_folder(model)
    sparse = load(folder)
    print(sample(sparse, saved_tokenizer(folder), prompt, tokens=tokens, temperature=temperature, seed=seed))
