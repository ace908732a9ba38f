"""The micro-batches of a training, each of them a function of the number of its step and of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch.utils.data import default_collate

Batch = Mapping[str, Any]


class Samples(Protocol):
    """A map-style dataset, or a list of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


@dataclass(frozen=True)
class Batches:
    """Shuffles a dataset anew for every epoch, and cuts it into the micro-batches of step 0, 1, 2, ...

    Calling it with the number of a step gives the micro-batches of that step, which are read only where they are used.
    So the position in the data is the number of the step, whoever computes which micro-batch. Every sample is in
    exactly one micro-batch of an epoch; one in which an epoch ends is filled by the next epoch.

    Attributes:
        dataset: map-style, with samples by name.
        size: samples of a micro-batch.
        micro_batches: of a step, over all replicas.
        seed: of the order.
        collate: makes a batch of samples.

    Raises:
        ValueError: an empty dataset, or a size below 1.
    """

    dataset: Samples
    size: int
    micro_batches: int
    seed: int = 0
    collate: Callable[[list[Any]], Batch] = default_collate

    def __post_init__(self) -> None:
        if not len(self.dataset):
            raise ValueError("the dataset has no samples to train on")
        if self.size < 1 or self.micro_batches < 1:
            raise ValueError(f"size={self.size}, micro_batches={self.micro_batches}: both must be at least 1")

    def __call__(self, step: int) -> Sequence[Batch]:
        """The micro-batches of a step, from 0."""
        return _OfStep(self, step)


@dataclass(frozen=True)
class _OfStep(Sequence[Batch]):
    batches: Batches
    step: int

    def __len__(self) -> int:
        return self.batches.micro_batches

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"micro-batch {index} of {len(self)}")
        whole, size = self.batches, self.batches.size
        first = (self.step * len(self) + index) * size
        samples = len(whole.dataset)
        places = (divmod(i, samples) for i in range(first, first + size))
        return whole.collate([whole.dataset[_order(samples, whole.seed, epoch)[place]] for epoch, place in places])

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))


@lru_cache(maxsize=2)
def _order(samples: int, seed: int, epoch: int) -> list[int]:
    coin = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(samples, generator=coin).tolist()
