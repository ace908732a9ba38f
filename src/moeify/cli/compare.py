"""`moeify compare`: `moeify train` over several seeds, to separate a difference from noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moeify.cli import options as o
from moeify.cli.train import Train


@dataclass(frozen=True, kw_only=True)
class Compare(Train):
    """Train a sparse model and its dense baseline over several seeds, and say by how much they differ.

    Takes the options of `moeify train`; only the defaults of --seeds and --output are others.
    """

    seeds: o.Seeds = 3
    output: o.Output = Path("runs/compare")
