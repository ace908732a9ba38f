"""`moeify compare`: `moeify train` over several seeds, to tell a difference from noise."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from moeify.cli.train import train

_DEFAULTS = {"seeds": 3, "output": Path("runs/compare")}


def compare(**options: Any) -> None:
    """Train a sparse model and its dense twin over several seeds, and say by how much they differ.

    Takes the options of `moeify train`; only the defaults of --seeds and --output are others.
    """
    train(**options)


vars(compare)["__signature__"] = inspect.Signature(
    [
        p.replace(default=_DEFAULTS.get(p.name, p.default))
        for p in inspect.signature(train, eval_str=True).parameters.values()
    ]
)
