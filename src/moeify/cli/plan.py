"""`moeify plan`: the fastest layout of a sparse model on a cluster, what binds it, and its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moeify.parallel import ModelShape, Workload

Model = Annotated[
    str,
    typer.Argument(help="A sparse model: a folder, of moeify or transformers, a config.json, or a hub name"),
]
ClusterFile = Annotated[Path, typer.Option(help="The cluster, a .toml or .json file; see docs/guide/planning.md")]
Trace = Annotated[
    Path | None,
    typer.Option(help="A trace of moeify trace, whose routing is planned for", show_default="balanced routing"),
]


def plan(
    model: Model,
    cluster: ClusterFile,
    trace: Trace = None,
    skew: Annotated[float, typer.Option(min=0, help="Without a trace: routing by Zipf's law with this exponent")] = 0.0,
    length: Annotated[int, typer.Option(min=1, help="Tokens per sequence")] = 4096,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences per step, over all devices")] = 256,
    program: Annotated[
        str, typer.Option("--for", help="The program that trains: transformers, torchtitan or megatron")
    ] = "transformers",
    emit: Annotated[
        str | None,
        typer.Option(help="Plan for this program, and print its configuration instead", show_default="none"),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Layouts to show")] = 5,
) -> None:
    """Rank every layout of a sparse model on a cluster, and name what keeps the best from being faster."""
    from moeify.parallel import Cluster
    from moeify.parallel import plan as ranked
    from moeify.parallel.emit import EMIT

    if emit is not None and emit not in EMIT:
        raise ValueError(f"no configuration for {emit!r} can be written, only for {', '.join(EMIT)}")
    described, shape = Cluster.read(cluster), _shape(model)
    found = ranked(
        shape, described, _workload(trace, skew, shape), length=length, sequences=sequences, target=emit or program
    )
    if emit is not None:
        print(EMIT[emit](found.best.layout, shape, length), end="")
        return
    total = len(found.choices) + len(found.too_large)
    print(f"moeify: {len(found.choices):,} of {total:,} layouts fit\n{found.explain()}\n")
    for row in found.rows(top):
        print(f"{row['ms']:10,.1f} ms {row['tokens/s']:12,.0f} tokens/s {row['GB']:8.1f} GB   {row['layout']}")


def _shape(source: str) -> ModelShape:
    from moeify.files import read_json
    from moeify.parallel import ModelShape
    from moeify.store import load
    from moeify.tasks.models import load_dense

    folder = Path(source).parent if Path(source).name == "config.json" else Path(source)
    if (folder / "config.json").is_file() and "moeify" in read_json(folder / "config.json"):
        return ModelShape.of(load(folder), folder.name)
    return ModelShape.of_config(load_dense(str(folder), "AutoConfig"), folder.name)


def _workload(trace: Path | None, skew: float, shape: ModelShape) -> Workload:
    from moeify.inspect.formats import read_trace
    from moeify.parallel import Workload

    if trace is not None:
        return Workload.traced(read_trace(trace))
    return Workload.skewed(shape.num_experts, skew, layers=shape.sparse_layers)
