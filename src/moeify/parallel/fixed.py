"""What a micro-batch costs whatever its tokens: the processor's work for blocks, for gathered units, for exchanges."""

from __future__ import annotations

from dataclasses import dataclass, fields
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moeify.experts import FFN
from moeify.moe import MoE
from moeify.ranks import all_reduce, count, several
from moeify.routers import TopK

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, EXPERTS_EACH, TOKENS = 32, 2, 8
SHALLOW, DEEP = 1, 4
WARM, TURNS = 2, 7


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """Seconds that no number of tokens changes, and that nothing hides; all 0 where a host issues work ahead.

    Attributes:
        micro_batch: of a micro-batch, forward and backward, outside of its blocks.
        block: of a sparse block, forward; backward is twice that.
        gather: of gathering the parameters of a unit of FSDP once, or of reducing its gradients.
        exchange: of sending the rows of a sparse layer to their experts, or back.
    """

    micro_batch: float = 0.0
    block: float = 0.0
    gather: float = 0.0
    exchange: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"{name} of the fixed costs is {value!r}; it must be a number of seconds, 0 or more")

    def slowed(self, factor: float) -> Fixed:
        """These costs times a factor."""
        return Fixed(**{field.name: factor * getattr(self, field.name) for field in fields(self)})

    @classmethod
    def measure(cls, clock: Callable[[], float]) -> Fixed:
        """The costs of a CPU, by steps of a small model with 8 tokens here, and under `shard` in all processes.

        All processes call it together, and get the same answer.

        Args:
            clock: in seconds.
        """
        alone = {depth: _seconds(_Small(depth), clock) for depth in (SHALLOW, DEEP)}
        block = (alone[DEEP] - alone[SHALLOW]) / (DEEP - SHALLOW)
        found = {"micro_batch": alone[SHALLOW] - SHALLOW * block, "block": block / 3}
        if count() > 1:
            from moeify.parallel.shard import shard

            sharded, divided = (_seconds(shard(_Small(DEEP), ep=ep), clock) for ep in (1, count()))
            found["gather"] = (sharded - alone[DEEP]) / (3 * (DEEP + 1))  # twice gathered and once reduced
            found["exchange"] = (divided - sharded) / (4 * DEEP)
        values = torch.tensor(list(found.values()), dtype=torch.float64)
        means = (all_reduce(values) / count()).clamp_min(0).tolist() if several() else values.clamp_min(0).tolist()
        return cls(**dict(zip(found, means, strict=True)))


class _Block(nn.Module):
    """Attention and a sparse layer, each after a norm and beside a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: nn.LayerNorm(WIDTH) for name in ("attention", "sparse")})
        self.project = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH, bias=False) for name in "qkvo"})
        experts = EXPERTS_EACH * count()
        self.sparse = MoE(TopK(WIDTH, experts, k=2), FFN(experts, WIDTH, 2 * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms["attention"](x)
        q, k, v = (self.project[name](y).unflatten(-1, (2, -1)).transpose(1, 2) for name in "qkv")
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project["o"](seen.transpose(1, 2).flatten(-2))
        return x + self.sparse(self.norms["sparse"](x))


class _Small(nn.Module):
    """Some blocks between an embedding and a head."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.layers = nn.ModuleList(_Block() for _ in range(depth))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def _seconds(model: nn.Module, clock: Callable[[], float]) -> float:
    """The median time of a forward and a backward pass."""
    ids, found = torch.arange(TOKENS)[None], []
    for turn in range(WARM + TURNS):
        if several():
            torch.distributed.barrier()
        start = clock()
        model(ids).backward()
        found += [clock() - start] if turn >= WARM else []
    return median(found)
