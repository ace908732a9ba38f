"""A layout: how many processes share data, shards, tensors, stages and experts; and which layouts a program can run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from moeify.parallel.cluster import Cluster
from moeify.parallel.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Degrees of parallelism. Ranks count through tp first, then fsdp, dp and pp; experts take theirs from tp · fsdp.

    Attributes:
        dp: replicas of all shards.
        fsdp: processes of one replica, each with its own data.
        tp: processes that split every matrix outside experts.
        pp: stages of a pipeline.
        ep: processes that hold different experts; a divisor of tp · fsdp.
        micro_batch: sequences of a process in one forward pass.
        accumulation: forward passes of a step.
        recompute: whether blocks are computed again in backward instead of being kept.
    """

    dp: int = 1
    fsdp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    micro_batch: int = 1
    accumulation: int = 1
    recompute: bool = False

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.dp * self.fsdp * self.tp * self.pp

    @property
    def etp(self) -> int:
        """Processes that split every expert: all of tp, or none if experts are spread over processes."""
        return self.tp if self.ep == 1 else 1

    @property
    def efsdp(self) -> int:
        """Processes of a replica that hold the same experts, or the same slices of them."""
        return self.fsdp * self.tp // (self.ep * self.etp)

    @property
    def sequences(self) -> int:
        """Sequences of a step."""
        return self.dp * self.fsdp * self.micro_batch * self.accumulation

    @property
    def degrees(self) -> dict[str, int]:
        """dp, fsdp, tp, pp and ep."""
        return {name: getattr(self, name) for name in ("dp", "fsdp", "tp", "pp", "ep")}

    def __str__(self) -> str:
        shown = " ".join(f"{name}{degree}" for name, degree in self.degrees.items() if degree > 1) or "one device"
        again = ", recompute" if self.recompute else ""
        return f"{shown}, {self.micro_batch} x {self.accumulation}{again}"


class Target(ABC):
    """A program that trains: which layouts it runs, and what it shards.

    Attributes:
        name: of the program.
        shards_parameters: whether fsdp shards parameters and gradients too, or the state of the optimizer only.
    """

    name: str
    shards_parameters: bool

    def refuse(self, layout: Layout, shape: ModelShape) -> str | None:
        """Why the layout cannot be run, or None."""
        if (layout.fsdp * layout.tp) % layout.ep:
            return f"ep={layout.ep} does not divide fsdp · tp = {layout.fsdp * layout.tp}"
        if shape.num_experts % layout.ep:
            return f"ep={layout.ep} does not divide {shape.num_experts} experts"
        if layout.pp > 1 and shape.blocks % layout.pp:
            return f"pp={layout.pp} does not divide {shape.blocks} blocks"
        if shape.heads and shape.heads % layout.tp:
            return f"tp={layout.tp} does not divide {shape.heads} heads"
        return self.refuse_here(layout)

    @abstractmethod
    def refuse_here(self, layout: Layout) -> str | None:
        """Why this program in particular cannot run it, or None."""


class Transformers(Target):
    """`DistributedConfig` of transformers 5.24: FSDP2, tensor and expert parallelism; its pipeline has no backward."""

    name = "transformers"
    shards_parameters = True

    def refuse_here(self, layout: Layout) -> str | None:
        """A pipeline, and what `DistributedConfig._validate_mesh_config` refuses."""
        if layout.pp > 1:
            return "the pipeline of transformers computes forward passes only, and training needs the backward pass"
        if layout.ep > 1 and layout.ep % layout.tp:
            return f"ep={layout.ep} is not a multiple of tp={layout.tp}, as transformers needs"
        return None


class Torchtitan(Target):
    """torchtitan: FSDP2, tensor, expert and pipeline parallelism."""

    name = "torchtitan"
    shards_parameters = True

    def refuse_here(self, layout: Layout) -> str | None:
        """A pipeline needs at least as many micro-batches as stages to be filled."""
        if layout.pp > layout.accumulation:
            return f"{layout.accumulation} micro-batches do not fill {layout.pp} stages"
        return None


class Megatron(Target):
    """Megatron-Core with its distributed optimizer, which shards optimizer states over data-parallel processes."""

    name = "megatron"
    shards_parameters = False

    def refuse_here(self, layout: Layout) -> str | None:
        """Its replicas are its data-parallel processes, over which it shards its optimizer."""
        if layout.dp > 1:
            return (
                "Megatron's distributed optimizer shards over all data-parallel processes: dp is 1, fsdp their number"
            )
        if layout.pp > layout.accumulation:
            return f"{layout.accumulation} micro-batches do not fill {layout.pp} stages"
        return None


TARGETS: dict[str, Target] = {target.name: target for target in (Transformers(), Torchtitan(), Megatron())}


def layouts(shape: ModelShape, cluster: Cluster, target: Target, sequences: int) -> Iterator[Layout]:
    """Every layout of all devices that the target runs, with every division of the step's sequences.

    Args:
        shape: of the model.
        cluster: all of whose devices take part; tensor parallelism stays inside a node.
        target: the program.
        sequences: of one step, over all processes.
    """
    for tp in _divisors(cluster.devices_per_node):
        for pp in _divisors(cluster.size // tp):
            for fsdp in _divisors(cluster.size // (tp * pp)):
                dp = cluster.size // (tp * pp * fsdp)
                each, rest = divmod(sequences, dp * fsdp)
                if rest:
                    continue
                for ep, micro, again in product(_divisors(fsdp * tp), _divisors(each), (False, True)):
                    layout = Layout(
                        dp=dp, fsdp=fsdp, tp=tp, pp=pp, ep=ep,
                        micro_batch=micro, accumulation=each // micro, recompute=again,
                    )  # fmt: skip
                    if target.refuse(layout, shape) is None:
                        yield layout


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
