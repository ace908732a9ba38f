"""What a model is trained for: how samples become a batch, and how its answers to a batch are judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import default_data_collator

Sample = Mapping[str, Any]
Batch = dict[str, Any]


class Samples(Protocol):
    """A map-style dataset of torch whose samples are a model's inputs by name, with `labels`.

    Attributes:
        length: pieces (tokens, patches, frames) of a sample, by which FLOPs are counted.
    """

    length: int

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """Return a sample."""
        ...

    def domain_of(self, index: int, /) -> str:
        """Return the name of the group that a sample belongs to, such as its class."""
        ...


@dataclass(frozen=True)
class Units:
    """What a report calls things.

    Attributes:
        piece: what the experts receive one by one.
        pieces: its plural.
        loss: the unit of the loss.
    """

    piece: str = "token"
    pieces: str = "tokens"
    loss: str = "nats per token"


@dataclass(frozen=True)
class Judged:
    """What a model made of a batch.

    Attributes:
        losses: of every sample, nats.
        answers: whatever `Objective.scores` needs of the batch.
    """

    losses: Float[Tensor, "B"]
    answers: Any = None


class Objective(ABC):
    """A loss per sample and the scores of a validation set. In training a model computes its loss by itself."""

    units: ClassVar[Units] = Units()

    def collate(self, samples: Sequence[Any]) -> Batch:
        """Make a batch of the model's inputs of some samples; by default their tensors are stacked."""
        return default_data_collator(list(samples))

    @abstractmethod
    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Run the model on a batch, and judge its answers; called in evaluation mode, without gradients."""

    def scores(self, answers: Sequence[Any]) -> dict[str, float]:
        """Return the scores by name, such as `accuracy`, of the answers of all batches."""
        return {}

    def final_scores(self, model: nn.Module, samples: Samples) -> dict[str, float]:
        """Return the scores that are too dear to be measured along the way, such as those of generated text."""
        return {}


class NextToken(Objective):
    """Predict every token of a row from those before it in its document; the loss is a mean over the row."""

    def judge(self, model: nn.Module, batch: Batch) -> Judged:
        """Return the mean loss of every row in nats per token; tokens whose label is -100 do not count."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits, labels = model(**inputs).logits[:, :-1].float(), batch["labels"][:, 1:]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        means = losses.sum(1) / (labels != -100).sum(1).clamp(min=1)
        return Judged(means, means)

    def scores(self, answers: Sequence[Any]) -> dict[str, float]:
        """Return the perplexity."""
        return {"perplexity": torch.cat(list(answers)).mean().exp().item()}
