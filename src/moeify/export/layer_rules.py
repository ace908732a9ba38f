"""Rules of sparse layers: how configurations store which layers are sparse, expert groups, and shared experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moeify.export.model_spec import Unsupported
from moeify.export.rules import Traits


@dataclass(frozen=True)
class AllSparse:
    """Every layer has experts."""

    fields: tuple[str, ...] = ()

    def read(self, config: Any) -> tuple[int, ...]:
        """All layers."""
        return tuple(range(config.num_hidden_layers))

    def write(self, value: tuple[int, ...], traits: Traits) -> dict[str, Any]:
        """No field, if all layers have experts."""
        if len(value) != traits["layers"]:
            raise Unsupported(
                f"all its layers are sparse, {len(value)} of the model's {traits['layers']} are; make every layer "
                "sparse (where=ffn)"
            )
        return {}


@dataclass(frozen=True)
class DenseListed:
    """A list names the dense layers."""

    fields: tuple[str, ...] = ("mlp_only_layers", "decoder_sparse_step")

    def read(self, config: Any) -> tuple[int, ...]:
        """The other layers, at the class's interval between sparse layers."""
        dense, step = set(config.mlp_only_layers), config.decoder_sparse_step
        return tuple(i for i in range(config.num_hidden_layers) if i not in dense and (i + 1) % step == 0)

    def write(self, value: tuple[int, ...], traits: Traits) -> dict[str, Any]:
        """The dense ones."""
        return {"mlp_only_layers": sorted(set(range(traits["layers"])) - set(value)), "decoder_sparse_step": 1}


@dataclass(frozen=True)
class DenseFirst:
    """The first layers are dense."""

    name: str = "first_k_dense_replace"

    @property
    def fields(self) -> tuple[str, ...]:
        """The field."""
        return (self.name,)

    def read(self, config: Any) -> tuple[int, ...]:
        """The layers after them."""
        return tuple(range(min(getattr(config, self.name), config.num_hidden_layers), config.num_hidden_layers))

    def write(self, value: tuple[int, ...], traits: Traits) -> dict[str, Any]:
        """How many are dense."""
        first = traits["layers"] - len(value)
        if value != tuple(range(first, traits["layers"])):
            raise Unsupported("its sparse layers all follow its dense ones, and in the model they alternate")
        return {self.name: first}


@dataclass(frozen=True)
class EveryFew:
    """One layer in every `interval` is sparse, between a first and a last one (Ernie 4.5)."""

    fields: tuple[str, ...] = ("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")

    def read(self, config: Any) -> tuple[int, ...]:
        """Those layers."""
        last = config.moe_layer_end_index if config.moe_layer_end_index >= 0 else config.num_hidden_layers - 1
        layers, step = range(config.moe_layer_start_index, last + 1), config.moe_layer_interval
        return tuple(i for i in layers if (i + 1) % step == 0)

    def write(self, value: tuple[int, ...], traits: Traits) -> dict[str, Any]:
        """The first layer, the last layer and the interval that select exactly these."""
        for step in range(1, traits["layers"] + 1):
            if value == tuple(i for i in range(value[0], value[-1] + 1) if (i + 1) % step == 0):
                return dict(zip(self.fields, (value[0], value[-1], step), strict=True))
        raise Unsupported(
            f"its sparse layers follow at equal intervals, and the model's do not: {', '.join(map(str, value))}"
        )


@dataclass(frozen=True)
class Groups:
    """Group-limited routing: a token may use experts of some groups only.

    Attributes:
        reduce: how a group scores, see `moeify.routers.ExpertGroups`.
    """

    reduce: str
    fields: tuple[str, ...] = ("n_group", "topk_group")

    def read(self, config: Any) -> tuple[int, int, str] | None:
        """The number of groups, how many are kept, and how a group is scored; None where all are kept."""
        count, keep = (getattr(config, name) for name in self.fields)
        return None if not count or count == keep else (count, keep, self.reduce)

    def write(self, value: tuple[int, int, str] | None, traits: Traits) -> dict[str, Any]:
        """Both numbers."""
        count, keep, reduce = value or (1, 1, self.reduce)
        if reduce != self.reduce:
            raise Unsupported(f"it scores expert groups by {self.reduce!r}, the model by {reduce!r}")
        if traits["num_experts"] // count < 2:
            raise Unsupported("it needs at least two experts per group")
        return dict(zip(self.fields, (count, keep), strict=True))


@dataclass(frozen=True)
class GreedyGroups:
    """Group-limited routing that a field switches on, with groups scored by their best expert (DeepSeek-V2)."""

    groups: Groups = Groups("max")
    method: str = "topk_method"

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields."""
        return (*self.groups.fields, self.method)

    def read(self, config: Any) -> tuple[int, int, str] | None:
        """As of `Groups`; None where the method is another."""
        return self.groups.read(config) if getattr(config, self.method) == "group_limited_greedy" else None

    def write(self, value: tuple[int, int, str] | None, traits: Traits) -> dict[str, Any]:
        """Both numbers and the method."""
        method = "greedy" if value is None else "group_limited_greedy"
        return self.groups.write(value, traits) | {self.method: method}


@dataclass(frozen=True)
class SharedWidth:
    """A field holds the width of the shared expert.

    Attributes:
        name: of the field.
        kind: `plain`, or `gated` by a sigmoid.
        always: whether the class has one in any case.
    """

    name: str
    kind: str
    always: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """The field."""
        return (self.name,)

    def read(self, config: Any) -> tuple[str, int] | None:
        """Kind and width; None if there is no shared expert."""
        width = getattr(config, self.name)
        return (self.kind, width) if width or self.always else None

    def write(self, value: tuple[str, int] | None, traits: Traits) -> dict[str, Any]:
        """The width."""
        if value is None and self.always:
            raise Unsupported(f"it has a {self.kind} shared expert, the model none", (self.kind, 0))
        if value is not None and value[0] != self.kind:
            raise Unsupported(f"its shared expert is {self.kind}, the model's is {value[0]}")
        return {self.name: value[1] if value else 0}


@dataclass(frozen=True)
class SharedCount:
    """A field holds the width of the shared expert in units of one expert's; it has no gate."""

    name: str
    always: bool = True

    @property
    def fields(self) -> tuple[str, ...]:
        """The field."""
        return (self.name,)

    def read(self, config: Any) -> tuple[str, int] | None:
        """Kind and width; None if there is no shared expert."""
        count = getattr(config, self.name) or 0
        return ("plain", count * config.moe_intermediate_size) if count or self.always else None

    def write(self, value: tuple[str, int] | None, traits: Traits) -> dict[str, Any]:
        """The number of experts."""
        if value is None and self.always:
            raise Unsupported("it has a shared expert, the model none", ("plain", 0))
        kind, width = value or ("plain", 0)
        if kind != "plain":
            raise Unsupported(f"its shared expert has no gate, the model's is {kind}")
        count = -(-width // traits["expert_hidden"])
        if count * traits["expert_hidden"] != width:
            whole = count * traits["expert_hidden"]
            raise Unsupported(f"its shared expert is {whole} wide, the model's {width}", ("plain", whole))
        return {self.name: count}


@dataclass(frozen=True)
class SomeShared:
    """A shared expert of width 1 or more, as in llama.cpp, which computes it even where its tensors are missing.

    Attributes:
        rule: how wide it is.
        kind: `plain`, or `gated` by a sigmoid.
    """

    rule: SharedWidth | SharedCount
    kind: str

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of its width."""
        return self.rule.fields

    def read(self, config: Any) -> tuple[str, int] | None:
        """Kind and width; None if there is no shared expert."""
        return self.rule.read(config)

    def write(self, value: tuple[str, int] | None, traits: Traits) -> dict[str, Any]:
        """The width."""
        if value is None or value[1] == 0:
            raise Unsupported("it has a shared expert, the model none", (self.kind, traits["expert_hidden"]))
        return self.rule.write(value, traits)
