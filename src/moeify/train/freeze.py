"""Choose which parts of a sparse model are trained: routers, experts, what they share, and the base around them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn

from moeify.experts.slices import slices_of
from moeify.layers import sparse_layers

BASE = ("attention", "embeddings", "norms", "rest")
"""The parts outside the sparse layers; papers call them non-MoE or non-expert parameters."""
PARTS = ("router", "experts", "shared", *BASE)
"""Every parameter of a model belongs to one of these."""


@dataclass(frozen=True)
class Share:
    """How much of a part is trained.

    Attributes:
        part: one of `PARTS`.
        tensors: its number of parameter tensors.
        parameters: its number of parameters.
        trained: how many of these are trained.
    """

    part: str
    tensors: int
    parameters: int
    trained: int

    @property
    def share(self) -> float:
        """The share of the part's parameters that is trained."""
        return self.trained / self.parameters


@dataclass(frozen=True)
class Trainable:
    """What is trained in a model, by part; parts that the model does not have are omitted."""

    rows: tuple[Share, ...]

    def __getitem__(self, part: str) -> Share:
        return {row.part: row for row in self.rows}[part]

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that the model has."""
        return tuple(row.part for row in self.rows)

    @property
    def total(self) -> Share:
        """The model as a whole."""
        sums = (sum(getattr(row, name) for row in self.rows) for name in ("tensors", "parameters", "trained"))
        return Share("model", *sums)

    def show(self, console: Console | None = None) -> None:
        """Print the table."""
        table = Table(title="what learns", title_justify="left")
        for heading in ("part", "tensors", "parameters", "trained", "share"):
            table.add_column(heading, justify="left" if heading == "part" else "right")
        for row in (*self.rows, self.total):
            numbers = (f"{number:,}" for number in (row.tensors, row.parameters, row.trained))
            table.add_row(row.part, *numbers, f"{row.share:.1%}")
        (Console() if console is None else console).print(table)


def freeze(model: nn.Module, *parts: str | re.Pattern[str], verbose: bool = True) -> Trainable:
    """Freeze parts of a model, print what is still trained, and return it.

    Frozen parameters lose their gradient, so an optimizer that holds them already leaves them as they are.

    Args:
        model: a sparse model of moeify, or a mixture-of-experts model of transformers.
        parts: `router`, `experts`, `shared` (what reads every token beside the experts), `attention`, `embeddings`,
            `norms`, `rest` (dense feed-forward networks, heads); `base` for the last four. Or the name of a module or
            parameter, or a compiled regular expression to be found in the names of parameters.
        verbose: print the table.

    Raises:
        ValueError: no part, one that the model does not have, or nothing is left to train; nothing is frozen then.
    """
    chosen = _chosen(model, parts)
    if not any(p.requires_grad for name, p in model.named_parameters() if name not in chosen):
        raise ValueError(
            f"with {', '.join(map(_show, parts))} frozen, nothing in this {type(model).__name__} is left to learn; "
            "freeze fewer parts, or unfreeze others before"
        )
    for name in chosen:
        parameter = model.get_parameter(name)
        parameter.requires_grad_(False)
        parameter.grad = None
    return _report(model, verbose)


def unfreeze(model: nn.Module, *parts: str | re.Pattern[str], verbose: bool = True) -> Trainable:
    """Unfreeze parts of a model, named as in `freeze`, print what is trained now, and return it.

    Make the optimizer afterwards: one that was made before may lack these parameters.

    Raises:
        ValueError: no part, or one that the model does not have.
    """
    for name in _chosen(model, parts):
        model.get_parameter(name).requires_grad_(True)
    return _report(model, verbose)


def trainable(model: nn.Module) -> Trainable:
    """What is trained in a model, by part."""
    belongs, slices = part_of(model), slices_of(model)
    rows = []
    for part in PARTS:
        tensors = [p for name, p in model.named_parameters() if belongs[name] == part]
        if tensors:
            stored = [p.numel() for p in tensors if p not in slices]
            trained = sum(p.numel() for p in tensors if p.requires_grad)
            rows.append(Share(part, len(stored), sum(stored), trained))
    return Trainable(tuple(rows))


def require_learning_routers(model: nn.Module) -> None:
    """Refuse a balance or z-loss where every router is frozen.

    Raises:
        ValueError: the model's routers have parameters, and none of these is trained.
    """
    table = trainable(model)
    if "router" in table.parts and table["router"].trained == 0:
        raise ValueError(
            "a balance or z-loss was asked for, but all routers are frozen: it can only move the layers before them. "
            "Pass SparseArguments(balance=0, z=0), or unfreeze(model, 'router'); if those layers are what should move, "
            "give the loss among the others, SparseArguments(losses=[(weight, moeify.losses.balance)])"
        )


def part_of(model: nn.Module) -> dict[str, str]:
    """The part of `PARTS` that each parameter belongs to, by the parameter's name."""
    sparse: dict[int, str] = {}
    for part, module in _sparse_parts(model):
        for parameter in module.parameters():
            sparse.setdefault(id(parameter), part)
    layers = [name.rpartition(".")[0] for name in sparse_layers(model)]
    return {name: sparse.get(id(p)) or _outside(model, name, layers) for name, p in model.named_parameters()}


def _sparse_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for layer in sparse_layers(model).values():
        if layer.router is not None:
            yield "router", layer.router
        yield "experts", layer.experts
        if layer.shared is not None:
            yield "shared", layer.shared


def _outside(model: nn.Module, name: str, layers: list[str]) -> str:
    """The part of a parameter that belongs to neither routers nor experts.

    Families of transformers agree on the words in names, `shared_experts`, `self_attn`, `embed_tokens`, more than on
    anything else.
    """
    *path, _ = name.split(".")
    above = [model.get_submodule(".".join(path[: i + 1])) for i in range(len(path))]
    owner = above[-1] if above else model
    words = name.lower()
    if any("shared" in words.removeprefix(layer) for layer in layers if name.startswith(f"{layer}.")):
        return "shared"
    if "norm" in type(owner).__name__.lower():
        return "norms"
    if "attn" in words or "attention" in words or any(type(m).__name__.endswith("Attention") for m in above):
        return "attention"
    return "embeddings" if isinstance(owner, nn.Embedding) or "embed" in words else "rest"


def _chosen(model: nn.Module, parts: tuple[str | re.Pattern[str], ...]) -> list[str]:
    """The names of the parameters in some parts."""
    if not parts:
        raise ValueError(f"name what to freeze or unfreeze: {', '.join(PARTS)}, base, or the name of a module")
    belongs = part_of(model)
    chosen = []
    for part in parts:
        found = [name for name in belongs if _matches(part, name, belongs[name])]
        if not found:
            has = ", ".join(trainable(model).parts)
            raise ValueError(
                f"this {type(model).__name__} has no parameter in {_show(part)}; its parts are {has} "
                f"(base: {', '.join(BASE)}); or give the name of a module, or a compiled regular expression"
            )
        chosen += found
    return chosen


def _matches(wanted: str | re.Pattern[str], name: str, part: str) -> bool:
    if isinstance(wanted, re.Pattern):
        return wanted.search(name) is not None
    return wanted == part or (wanted == "base" and part in BASE) or name == wanted or name.startswith(f"{wanted}.")


def _show(part: str | re.Pattern[str]) -> str:
    return repr(part.pattern if isinstance(part, re.Pattern) else part)


def _report(model: nn.Module, verbose: bool) -> Trainable:
    report = trainable(model)
    if verbose:
        report.show()
    return report
