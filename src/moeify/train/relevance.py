"""Which experts matter for some data: the relevance scores of ESFT, and the experts that they choose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moeify.routing import Assignment, Routing
from moeify.train.calibrate import route

Score = Callable[[Assignment], Float[Tensor, "E"]]


def selection_ratio(routing: Assignment) -> Float[Tensor, "E"]:
    """The share of a token's experts that each expert is, 1 / K or 0, summed over the tokens (ESFT-Token)."""
    share = 1 / routing.source.bincount().double()
    return _by_expert(routing, share[routing.source])


def average_gate(routing: Assignment) -> Float[Tensor, "E"]:
    """The weight of each expert, summed over the tokens (ESFT-Gate)."""
    return _by_expert(routing, routing.weight.double().flatten(1).sum(1) if routing.has_gate_axis else routing.weight)


def _by_expert(routing: Assignment, of_rows: Float[Tensor, "R"]) -> Float[Tensor, "E"]:
    return of_rows.new_zeros(len(routing.counts), dtype=torch.float64).index_add(0, routing.expert, of_rows.double())


@dataclass(frozen=True)
class Relevance:
    """How relevant every expert is to some data.

    Attributes:
        layers: the mean score per token of every expert, by the name of the sparse layer.
    """

    layers: dict[str, Float[Tensor, "E"]]

    def choose(self, threshold: float) -> dict[str, list[int]]:
        """The most relevant experts of each layer, as few as have scores that sum to the threshold or more.

        Raises:
            ValueError: a threshold outside (0, 1].
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold} is no share of the relevance; choose 0 < threshold <= 1")
        return {name: _most(scores, threshold) for name, scores in self.layers.items()}

    def show(self, threshold: float, console: Console | None = None) -> None:
        """Print the chosen experts of every layer, and the share of the relevance that they have."""
        table = Table("layer", "experts", "of", "relevance", "chosen", title="relevant experts", title_justify="left")
        for name, chosen in self.choose(threshold).items():
            scores = self.layers[name]
            numbers = (str(len(chosen)), str(len(scores)), f"{scores[chosen].sum() / scores.sum():.1%}")
            table.add_row(name or "(model)", *numbers, ", ".join(map(str, chosen)))
        (Console() if console is None else console).print(table)


def _most(scores: Float[Tensor, "E"], threshold: float) -> list[int]:
    best = scores.argsort(descending=True, stable=True)
    before = scores[best].cumsum(0) - scores[best]
    return best[before < threshold].tolist()


def expert_relevance(
    model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor], score: Score = selection_ratio
) -> Relevance:
    """Score the experts of every layer on data, in evaluation, as ESFT does (arXiv 2407.01906).

    The paper takes 32 samples of 4,096 tokens, and the thresholds 0.2 with `selection_ratio`, 0.1 with `average_gate`.
    Scores are means over tokens, which equal the scores that the authors released.

    Args:
        model: a sparse model of moeify, or a mixture-of-experts model of transformers.
        batches: keyword arguments of the model, or its only argument.
        score: from a decision to the sums of the experts' scores over its tokens: `selection_ratio`, `average_gate`.

    Raises:
        ValueError: the model has no sparse layer, or one that chooses no experts (Soft MoE); no token was routed.
    """
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def add(name: str, routing: Routing) -> None:
        if not isinstance(routing, Assignment):
            raise ValueError(f"{name} mixes all tokens, so no expert is more relevant than another; train all experts")
        sums[name] = sums.get(name, 0) + score(routing).cpu()
        tokens[name] = tokens.get(name, 0) + routing.tokens

    route(model, batches, add)
    if not any(tokens.values()):
        raise ValueError("no token was routed, so no expert can be chosen; give at least one batch")
    return Relevance({name: total / tokens[name] for name, total in sums.items()})
