"""`moeify verify`: compare the files of a saved model with the hashes that were written with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    model: Annotated[Path, typer.Argument(help="A saved sparse model, or the folder of a run")],
) -> None:
    """Check that the files of a saved model are unchanged since they were saved."""
    from moeify import store
    from moeify.folders import model_folder

    folder = model_folder(model)
    store.verify(folder)
    print(f"every file of {folder} is what was saved")
