"""A trace: which experts every token was sent to, layer by layer, recorded from a model or read from a file."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PREFILL, DECODE = 0, 1
"""Values of `Tokens.phase`: a token of the prompt (or of any whole pass), and one that is decoded alone."""

COLUMNS = {
    "ids": torch.int32, "sequence": torch.int32, "position": torch.int32, "phase": torch.int8, "step": torch.int32,
    "batch": torch.int32, "domain": torch.int16, "modality": torch.int8,
}  # fmt: skip
"""The columns of a table of tokens, with their dtypes; -1 is an unknown value."""

LAYER_COLUMNS = ("experts", "weights", "dropped", "scores", "logits")
"""The columns of a layer, one row per token."""


@dataclass(frozen=True, eq=False, repr=False)
class Tokens:
    """A table of T tokens; layers that see the same tokens share one.

    Attributes:
        count: T.
        ids: numbers in the vocabulary.
        sequence: the sequence, request or image that each belongs to.
        position: its index in this sequence, from 0, padding excluded.
        phase: `PREFILL` or `DECODE`.
        step: the step of training, or of decoding, where the prompt is 0.
        batch: the number of the batch, or micro-batch.
        domain: an index into `domains`.
        modality: an index into `modalities`.
        domains: names of domains.
        modalities: names of modalities, such as `text` and `image`.
        vocabulary: the text of each id that occurs.
    """

    count: int
    ids: Int[Tensor, "T"] | None = None
    sequence: Int[Tensor, "T"] | None = None
    position: Int[Tensor, "T"] | None = None
    phase: Int[Tensor, "T"] | None = None
    step: Int[Tensor, "T"] | None = None
    batch: Int[Tensor, "T"] | None = None
    domain: Int[Tensor, "T"] | None = None
    modality: Int[Tensor, "T"] | None = None
    domains: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    vocabulary: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in self.columns.items():
            if values.shape != (self.count,):
                raise ValueError(f"{name} has shape {tuple(values.shape)}, and there are {self.count} tokens")
            object.__setattr__(self, name, _fitted(values, COLUMNS[name], name))
        for name, names in (("domain", self.domains), ("modality", self.modalities)):
            values = getattr(self, name)
            if values is not None and self.count and int(values.max()) >= len(names):
                raise ValueError(f"{name} has the number {int(values.max())}, and only {len(names)} of them have names")
        if self.phase is not None and self.count and int(self.phase.max()) > DECODE:
            raise ValueError(f"phase has the number {int(self.phase.max())}; it is 0 for prefill and 1 for decoding")

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        return f"Tokens({self.count}: {', '.join(self.columns)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokens) and _equal(self, other)

    __hash__ = None  # pyrefly: ignore[bad-override]

    @property
    def columns(self) -> dict[str, Int[Tensor, "T"]]:
        """The columns that are there, by name."""
        found = {name: getattr(self, name) for name in COLUMNS}
        return {name: values for name, values in found.items() if values is not None}

    def need(self, name: str) -> Int[Tensor, "T"]:
        """A column that must be there.

        Raises:
            ValueError: the trace does not have it.
        """
        if (values := getattr(self, name)) is None:
            raise ValueError(
                f"the trace does not have the {name} of its tokens, only {', '.join(self.columns) or 'their number'}; "
                "record it by moeify trace"
            )
        return values

    def take(self, kept: Bool[Tensor, "T"] | Int[Tensor, "kept"]) -> Tokens:
        """Some of the tokens, by a mask or by their indices."""
        columns = {name: values[kept] for name, values in self.columns.items()}
        return replace(self, count=_size(kept), **columns)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LayerTrace:
    """The routing decisions of one layer for a table of tokens.

    Attributes:
        name: of the layer, as in `moeify.record`.
        num_experts: E.
        tokens: the table.
        experts: the experts of every token, best first if the router ranks them; -1 where a token has fewer than K. A
            row that a capacity moved has the expert that it was moved to. Soft MoE chooses none: K is 0.
        weights: their weights, if they are known.
        dropped: which of them a capacity dropped; None if none was, or if unknown.
        scores: of all experts, after the score function; of Soft MoE the weight of each expert's slots.
        logits: of all experts.
        extra: further values of every row that a file format has, by name, such as the bytes that were read for it.
    """

    name: str
    num_experts: int
    tokens: Tokens
    experts: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"] | None = None
    dropped: Bool[Tensor, "T K"] | None = None
    scores: Float[Tensor, "T E"] | None = None
    logits: Float[Tensor, "T E"] | None = None
    extra: Mapping[str, Int[Tensor, "T K"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"layer {self.name} has {self.num_experts} experts; there is at least one")
        if self.experts.dim() != 2 or len(self.experts) != len(self.tokens):
            raise ValueError(
                f"experts of layer {self.name} have shape {tuple(self.experts.shape)}, and it needs one row for each "
                f"of its {len(self.tokens)} tokens"
            )
        kind = torch.int16 if self.num_experts <= 2**15 else torch.int32
        if self.experts.numel() and int(self.experts.max()) >= self.num_experts:
            raise ValueError(
                f"a token of layer {self.name} has expert {int(self.experts.max())}, and there are "
                f"{self.num_experts}, counted from 0"
            )
        object.__setattr__(self, "experts", _fitted(self.experts, kind, f"experts of layer {self.name}"))
        wide = (len(self.tokens), self.num_experts)
        for name, shape in {"weights": self.experts.shape, "scores": wide, "logits": wide}.items():
            self._check(name, shape, "numbers", lambda values: values.is_floating_point())
        self._check("dropped", self.experts.shape, "true or false", lambda values: values.dtype == torch.bool)
        for name in self.extra:
            self._check(name, self.experts.shape, "numbers", lambda values: values.dtype != torch.bool)

    def _check(self, name: str, shape: tuple[int, ...], kind: str, fits: Callable[[Tensor], bool]) -> None:
        values = self.extra[name] if name in self.extra else getattr(self, name)
        if values is not None and values.shape != shape:
            raise ValueError(f"{name} of layer {self.name} have shape {tuple(values.shape)} instead of {tuple(shape)}")
        if values is not None and not fits(values):
            raise ValueError(f"{name} of layer {self.name} are {values.dtype}; they must be {kind}")

    def __repr__(self) -> str:
        columns = ", ".join((*self.columns, *self.extra))
        return f"LayerTrace({self.name}: {self.num_experts} experts, k={self.k}, {len(self.tokens)} tokens; {columns})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerTrace) and _equal(self, other)

    __hash__ = None  # pyrefly: ignore[bad-override]

    @property
    def k(self) -> int:
        """K, the most experts that a token has."""
        return self.experts.shape[1]

    @property
    def columns(self) -> dict[str, Tensor]:
        """The columns that are there, by name."""
        found = {name: getattr(self, name) for name in LAYER_COLUMNS}
        return {name: values for name, values in found.items() if values is not None}

    @property
    def assigned(self) -> Int[Tensor, "E"]:
        """Rows assigned to every expert before any capacity limit."""
        return _rows(self.experts, self.experts >= 0, self.num_experts)

    @property
    def counts(self) -> Int[Tensor, "E"]:
        """Rows that every expert computes."""
        there = self.experts >= 0
        return _rows(self.experts, there if self.dropped is None else there & ~self.dropped, self.num_experts)

    def take(self, kept: Bool[Tensor, "T"] | Int[Tensor, "kept"], tokens: Tokens | None = None) -> LayerTrace:
        """The layer for some of its tokens.

        Args:
            kept: which tokens, by a mask or by their indices.
            tokens: their table, if it was made already.
        """
        columns = {name: values[kept] for name, values in self.columns.items()}
        extra = {name: values[kept] for name, values in self.extra.items()}
        return replace(self, tokens=self.tokens.take(kept) if tokens is None else tokens, extra=extra, **columns)


@dataclass(frozen=True, repr=False, kw_only=True)
class Trace:
    """The decisions of the sparse layers of a model on some tokens.

    Attributes:
        layers: by name, in the order of the model.
        header: where it comes from, in plain values: `model`, `format` and further facts that the file format has.
    """

    layers: dict[str, LayerTrace]
    header: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a trace needs a layer; nothing was recorded")
        for name, layer in self.layers.items():
            if name != layer.name:
                raise ValueError(f"layer {layer.name} is called {name} in the trace; give it one name")

    @property
    def tables(self) -> list[Tokens]:
        """The tables of tokens, one for all layers that share it."""
        return list({id(layer.tokens): layer.tokens for layer in self.layers.values()}.values())

    def only(self, layers: Container[str] | Callable[[str], bool]) -> Trace:
        """The trace of some layers, by name.

        Raises:
            ValueError: none of them is there.
        """
        chosen = layers if callable(layers) else layers.__contains__
        kept = {name: layer for name, layer in self.layers.items() if chosen(name)}
        if not kept:
            raise ValueError(f"the trace has none of these layers, it has: {', '.join(self.layers)}")
        return replace(self, layers=kept)

    def where(self, choose: Callable[[Tokens], Bool[Tensor, "T"]]) -> Trace:
        """The trace of some tokens, such as those that were decoded:

            trace.where(lambda tokens: tokens.need("phase") == DECODE)

        Args:
            choose: a mask of the tokens of a table.
        """
        masks = {id(table): choose(table) for table in self.tables}
        tables = {id(table): table.take(masks[id(table)]) for table in self.tables}
        layers = {
            name: layer.take(masks[id(layer.tokens)], tables[id(layer.tokens)]) for name, layer in self.layers.items()
        }
        return replace(self, layers=layers)

    def without(self, *columns: str) -> Trace:
        """The trace without some columns of layers, such as `scores`."""
        none: dict[str, Any] = dict.fromkeys(columns)
        layers = {name: replace(layer, **none) for name, layer in self.layers.items()}
        return replace(self, layers=layers)

    def __repr__(self) -> str:
        return f"Trace({len(self.layers)} layers, {' and '.join(map(repr, self.tables))})"

    def __iter__(self) -> Iterator[LayerTrace]:
        return iter(self.layers.values())


def _size(kept: Tensor) -> int:
    return int(kept.sum()) if kept.dtype == torch.bool else len(kept)


def _rows(experts: Int[Tensor, "T K"], there: Bool[Tensor, "T K"], num_experts: int) -> Int[Tensor, "E"]:
    return experts[there].long().bincount(minlength=num_experts)


def _fitted(values: Tensor, kind: torch.dtype, name: str) -> Tensor:
    """Integers of at least -1, in the type of their column."""
    if values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(f"{name} must be whole numbers, not {values.dtype}")
    if values.numel() and (int(values.min()) < -1 or int(values.max()) > torch.iinfo(kind).max):
        raise ValueError(
            f"{name} lie between {int(values.min())} and {int(values.max())}; they must be between -1 (unknown) and "
            f"{torch.iinfo(kind).max}"
        )
    return values.detach().to("cpu", kind)


def _equal(one: Any, other: Any) -> bool:
    return all(_same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
