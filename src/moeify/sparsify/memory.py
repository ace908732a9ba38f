"""Memories, which look tokens up beside the experts: functions from the dense module and its width to one, or None."""

from __future__ import annotations

from torch import nn

from moeify.engram import Engram
from moeify.find.dense import compute_dtype
from moeify.registry import register
from moeify.sparsify.shared import nothing

register("memory", "nothing")(nothing)


@register("memory", "engram")
def engram(
    dense: nn.Module, width: int, *, rows: int = 4096, dimensions: int = 64, ngrams: int = 3, heads: int = 4,
    kernel: int = 4, pad: int = 0, key: str = "input_ids",
) -> Engram:  # fmt: skip
    """An `Engram`, whose settings these are.

    Args:
        dense: the dense module, which it does not read.
        width: D.
        rows: rows of each table at least.
        dimensions: of all rows of one n together.
        ngrams: the largest n.
        heads: tables per n.
        kernel: taps of the convolution.
        pad: the id in place of tokens that are not there.
        key: the name of the model's input that holds the ids.

    Raises:
        ValueError: as of `Engram`.
    """
    made = Engram(
        width, rows=rows, dimensions=dimensions, ngrams=ngrams, heads=heads, kernel=kernel, pad=pad, key=key
    )  # fmt: skip
    return made.to(compute_dtype(dense, dense))
