"""A cluster of accelerators in numbers: how many there are, how fast each is, and how fast the links between them."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from moeify.files import read_json, regular, write_json
from moeify.parallel.fixed import Fixed
from moeify.parallel.grouped import GroupedCost


def _positive(thing: Any, *names: str) -> None:
    for name in names:
        value = getattr(thing, name)
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{name} of a {type(thing).__name__.lower()} is {value!r}; it must be a positive number")


@dataclass(frozen=True, kw_only=True)
class Device:
    """An accelerator.

    Attributes:
        name: for people.
        memory: bytes.
        flops: FLOP/s of products in the precision of training, without sparsity, as its data sheet has them.
        bandwidth: bytes/s of its memory.
        products: share of `flops` that large products reach.
        attention: the same for scores and values.
        streaming: share of `bandwidth` that element-wise work reaches.
        experts: time of the products of experts.
        fixed: what a micro-batch takes whatever its tokens.
        overlap: share of its computing during which it also gathers parameters and reduces gradients, 0 to 1; 0 where
            its cores do both.
    """

    name: str = "device"
    memory: float
    flops: float
    bandwidth: float
    products: float = 0.7
    attention: float = 0.6
    streaming: float = 0.8
    experts: GroupedCost = field(default_factory=GroupedCost)
    fixed: Fixed = field(default_factory=Fixed)
    overlap: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "memory", "flops", "bandwidth", "products", "attention", "streaming")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap of a device is {self.overlap!r}; it must be a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins devices.

    Attributes:
        bandwidth: bytes/s that one device sends while all others send too.
        latency: seconds of an empty message.
    """

    bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        _positive(self, "bandwidth")


DEVICES = {
    "a100": Device(name="a100", memory=80e9, flops=312e12, bandwidth=2.04e12),
    "h100": Device(name="h100", memory=80e9, flops=989e12, bandwidth=3.35e12),
    "h200": Device(name="h200", memory=141e9, flops=989e12, bandwidth=4.8e12),
    "b200": Device(name="b200", memory=180e9, flops=2250e12, bandwidth=8e12),
}
"""Data sheets of NVIDIA's SXM modules, dense bf16."""

_SECTIONS = {"nodes", "devices_per_node", "device", "intra", "inter"}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal devices; ranks count through a node first.

    Attributes:
        nodes: their number.
        devices_per_node: devices of one.
        device: what each is.
        intra: the link inside a node.
        inter: the link between nodes.
    """

    nodes: int
    devices_per_node: int
    device: Device
    intra: Link
    inter: Link

    def __post_init__(self) -> None:
        _positive(self, "nodes", "devices_per_node")

    @property
    def size(self) -> int:
        """Number of devices."""
        return self.nodes * self.devices_per_node

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A cluster from plain values; `device` is a table of its numbers, or a name of `DEVICES`.

        Raises:
            ValueError: a number that is missing, unknown or not positive.
        """
        if unknown := set(values) - _SECTIONS:
            raise ValueError(f"a cluster has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(_SECTIONS))}")
        if missing := _SECTIONS - set(values) - ({"inter"} if values.get("nodes") == 1 else set()):
            raise ValueError(f"the cluster lacks {', '.join(sorted(missing))}")
        intra = _table(Link, "intra", values["intra"])
        inter = _table(Link, "inter", values["inter"]) if "inter" in values else intra
        return cls(
            nodes=int(values["nodes"]), devices_per_node=int(values["devices_per_node"]),
            device=_device(values["device"]), intra=intra, inter=inter,
        )  # fmt: skip

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """A cluster from a `.toml` or `.json` file.

        Raises:
            ValueError: the file is of neither format, damaged, or lacks a number.
            FileNotFoundError: there is no such file.
        """
        path = Path(path)
        try:
            if path.suffix == ".toml":
                return cls.from_dict(tomllib.loads(regular(path).read_text(encoding="utf-8")))
            if path.suffix == ".json":
                return cls.from_dict(read_json(path))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not describe a cluster: {error}") from None
        raise ValueError(f"{path} is neither .toml nor .json; describe the cluster in one of them")

    def write(self, path: str | Path) -> None:
        """Write the cluster as JSON, which `read` reads."""
        write_json(path, asdict(self), indent=2)

    def scaled(self, nodes: int) -> Self:
        """The cluster with another number of nodes."""
        return replace(self, nodes=nodes)

    def shared(self, cores: float) -> Self:
        """The cluster if its devices are processes that share some cores, each of which was measured as one device.

        Every device then has the same part of a core, at most one: products, memory and links are so much slower, for
        on one machine they all take time of its cores.

        Args:
            cores: of the machine.
        """
        part = min(cores / self.size, 1.0)
        launch, per_expert, tile = (
            getattr(self.device.experts, name) / part for name in ("launch", "per_expert", "tile")
        )
        experts = replace(self.device.experts, launch=launch, per_expert=per_expert, tile=tile)
        flops, bandwidth = self.device.flops * part, self.device.bandwidth * part
        intra, inter = (Link(bandwidth=x.bandwidth * part, latency=x.latency / part) for x in (self.intra, self.inter))
        fixed = self.device.fixed.slowed(1 / part)
        device = replace(self.device, flops=flops, bandwidth=bandwidth, experts=experts, fixed=fixed)
        return replace(self, device=device, intra=intra, inter=inter)

    def across(self, group: int, stride: int = 1) -> tuple[int, int]:
        """How many processes of a group, at equal distances, are on one node, and on how many nodes they are.

        Args:
            group: processes of the group.
            stride: distance of two neighbours.
        """
        here = max(1, min(group, self.devices_per_node // stride))
        return here, -(-group // here)


def _device(values: Any) -> Device:
    if isinstance(values, str):
        if values not in DEVICES:
            raise ValueError(f"there is no data sheet of {values!r}, only of {', '.join(DEVICES)}; give its numbers")
        return DEVICES[values]
    values = dict(values)
    known = DEVICES.get(values.pop("like", ""))
    if "experts" in values:
        values["experts"] = _table(GroupedCost, "device.experts", values["experts"])
    if "fixed" in values:
        values["fixed"] = _table(Fixed, "device.fixed", values["fixed"])
    return _table(Device, "device", (vars(known) if known else {}) | values)


def _table(kind: type, name: str, values: Mapping[str, Any]) -> Any:
    if unknown := set(values) - {f.name for f in fields(kind)}:
        raise ValueError(
            f"{name} has no {', '.join(sorted(unknown))}; it has {', '.join(f.name for f in fields(kind))}"
        )
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{name}: {str(error).partition('() ')[2]}") from None
