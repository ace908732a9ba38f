"""`moeify init`: the configuration of another training program as a file for `moeify train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    file: Annotated[Path, typer.Argument(help="The configuration, YAML or JSON")],
    program: Annotated[str, typer.Option("--from", help="The program that reads it: axolotl, llamafactory or trl")],
) -> None:
    """Print the options of `moeify train` that a configuration of Axolotl, LLaMA-Factory or TRL amounts to.

    Keys without an equivalent come first, as comments with the reason. `moeify init --from trl sft.yaml > job.yaml`,
    then `moeify train job.yaml`.
    """
    import yaml

    from moeify.integrations.configurations import translate

    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file} to read a configuration from")
    try:
        configuration = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not isinstance(configuration, dict):
        raise ValueError(f"{file} holds no keys and values")
    print(translate(program, configuration), end="")
