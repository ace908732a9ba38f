"""Loss and expert load by a token's position in its document: does a model hold up where texts are long?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.layers import sparse_layers
from moeify.modes import in_evaluation
from moeify.record import record
from moeify.statistics import load, max_violation


@dataclass(frozen=True)
class Positions:
    """What was measured of the tokens at the positions `first` to `last`, counted from 0 within a document.

    Attributes:
        first: the first position.
        last: the last one.
        tokens: how many tokens were predicted from there.
        loss: mean nats of the token after them; nan without tokens.
        rows: rows of every expert, by layer; empty for a dense model.
        elsewhere: of each layer, half the sum of |f_j - f'_j| of the load f of these positions and f' of all: 0 if the
            position makes no difference to which experts are used, 1 if they share none.
    """

    first: int
    last: int
    tokens: int
    loss: float
    rows: Mapping[str, Int[Tensor, "E"]]
    elsewhere: Mapping[str, float]

    @property
    def max_violation(self) -> dict[str, float]:
        """MaxVio of each layer at these positions."""
        return {name: float(max_violation(rows)) for name, rows in self.rows.items()}


def by_position(
    model: nn.Module, samples: Iterable[Mapping[str, Tensor]], edges: Sequence[int], *, chunk: int = 4096
) -> list[Positions]:
    """Measure a causal language model on samples, one at a time, apart by position.

    Args:
        model: gives `logits` for a call with the sample's tensors but `labels`.
        samples: `input_ids` and `labels` (N,), -100 where nothing is to be predicted, and what else the model reads,
            such as the `position_ids` of packed rows, which then are the positions.
        edges: where the ranges of positions begin, rising from 0; the last has no end.
        chunk: tokens whose log probabilities are computed at a time.

    Raises:
        ValueError: edges that do not rise from 0; no sample.
    """
    edges = list(edges)
    if edges[:1] != [0] or any(not (isinstance(b, Integral) and a < b) for a, b in pairwise(edges)):
        raise ValueError(f"the ranges of positions begin at {edges}; give whole numbers that rise from 0")
    begins = torch.tensor(edges)
    sums, counts, longest = torch.zeros(len(edges), dtype=torch.float64), torch.zeros(len(edges)), 0
    rows: dict[str, Int[Tensor, "ranges E"]] = {}
    seen = False
    with torch.no_grad(), in_evaluation(model):
        for sample in samples:
            seen, ids = True, sample["input_ids"]
            positions = sample.get("position_ids", torch.arange(len(ids)))
            where = torch.bucketize(positions, begins, right=True) - 1  # (N,)
            longest = max(longest, int(positions.max()))
            nats = _forward(model, sample, where, len(edges), rows, chunk)
            told = sample["labels"][1:] != -100
            sums.index_add_(0, where[:-1][told], nats[told].double())
            counts += where[:-1][told].bincount(minlength=len(edges))
    if not seen:
        raise ValueError("no sample to measure")
    ends = [*(edge - 1 for edge in edges[1:]), max(longest, edges[-1])]
    return [
        Positions(
            first, last, int(counts[i]), float(sums[i] / counts[i]), {name: of[i] for name, of in rows.items()},
            {name: float((load(of[i]) - load(of.sum(0))).abs().sum() / 2) for name, of in rows.items()},
        )
        for i, (first, last) in enumerate(zip(edges, ends, strict=True))
    ]  # fmt: skip


def _forward(
    model: nn.Module, sample: Mapping[str, Any], where: Int[Tensor, "N"], ranges: int,
    rows: dict[str, Int[Tensor, "ranges E"]], chunk: int,
) -> Float[Tensor, "N-1"]:  # fmt: skip
    """Nats of every next token; adds the rows that the experts get in each range to `rows`."""
    inputs = {name: value.unsqueeze(0) for name, value in sample.items() if name != "labels"}
    if not sparse_layers(model):
        logits = model(**inputs, use_cache=False).logits[0]
    else:
        with record(model) as decisions:
            logits = model(**inputs, use_cache=False).logits[0]
        for name, routing in decisions.items():
            reads = routing.reads().cpu()  # (N, E)
            found = reads.new_zeros(ranges, reads.shape[1], dtype=torch.int64).index_add(0, where, reads.long())
            rows[name] = rows.get(name, 0) + found
    target = sample["input_ids"][1:].to(logits.device)
    parts = [
        F.cross_entropy(part.float(), of, reduction="none")
        for part, of in zip(logits[:-1].split(chunk), target.split(chunk), strict=True)
    ]
    return torch.cat(parts).cpu()
