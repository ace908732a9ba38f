"""Mutual information of experts and groups of tokens, with its value under chance and a confidence interval."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeify import statistics
from moeify.inspect.panels.attributes import Groups
from moeify.inspect.trace import LayerTrace, Tokens

_SHUFFLES, _RESAMPLES, _UNITS = 4, 200, 32
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Bits:
    """Mutual information in bits per row.

    Attributes:
        found: of experts and groups.
        chance: the mean of it with shuffled groups.
        low: the 2.5 % quantile of found - chance, over resampled sequences.
        high: the 97.5 % quantile.
        units: how many sequences, or stretches of tokens, were resampled.
    """

    found: float
    chance: float
    low: float
    high: float
    units: int

    @property
    def excess(self) -> float:
        """Mutual information above chance."""
        return self.found - self.chance


def units_of(tokens: Tokens) -> Int[Tensor, "T"]:
    """What is resampled and shuffled as a whole: sequences, or where there are fewer than 8, stretches of tokens."""
    if tokens.sequence is not None:
        found, unit = tokens.sequence.unique(return_inverse=True)
        if len(found) >= 8:
            return unit
    length = max(1, -(-len(tokens) // _UNITS))
    return torch.arange(len(tokens)) // length


def information_bits(layer: LayerTrace, groups: Groups, unit: Int[Tensor, "T"], seed: int = 0) -> Bits:
    """I(expert; group) against shuffled groups, with a paired bootstrap over units.

    Where all tokens of a unit have one group, groups are shuffled between units, else between tokens: a domain is
    a property of a sequence, a position one of a token. Both terms of `found - chance` are computed on the same
    resampled units.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = _tables(layer, groups.of, unit, len(groups.names))
    weights = torch.ones(_RESAMPLES + 1, len(tables))
    drawn = torch.randint(len(tables), (_RESAMPLES, len(tables)), generator=generator)
    weights[1:] = torch.zeros(_RESAMPLES, len(tables)).scatter_add(1, drawn, torch.ones(drawn.shape))
    found = _bits(weights, tables)
    chance = torch.zeros(_RESAMPLES + 1)
    for _ in range(_SHUFFLES):
        chance += _bits(weights, _tables(layer, _shuffled(groups.of, unit, generator), unit, len(groups.names)))
    chance /= _SHUFFLES
    low, high = torch.quantile(found[1:] - chance[1:], torch.tensor([0.025, 0.975])).tolist()
    return Bits(float(found[0]), float(chance[0]), low, high, len(tables))


def _tables(layer: LayerTrace, group: Int[Tensor, "T"], unit: Int[Tensor, "T"], count: int) -> Float[Tensor, "U G E"]:
    """Rows by unit, group and expert."""
    there = (layer.experts >= 0) & (group >= 0).unsqueeze(1)
    units = int(unit.max()) + 1
    cell = (unit * count + group.clamp_min(0)).unsqueeze(1) * layer.num_experts + layer.experts.long().clamp_min(0)
    return cell[there].bincount(minlength=units * count * layer.num_experts).view(units, count, -1).float()


def _bits(weights: Float[Tensor, "B U"], tables: Float[Tensor, "U G E"]) -> Float[Tensor, "B"]:
    found = statistics.information((weights @ tables.flatten(1)).unflatten(1, tables.shape[1:]))
    return found.masked_fill(found.abs() < _ROUNDING, 0.0)


def _shuffled(group: Int[Tensor, "T"], unit: Int[Tensor, "T"], generator: torch.Generator) -> Int[Tensor, "T"]:
    units = int(unit.max()) + 1
    first = torch.zeros(units, dtype=group.dtype).scatter(0, unit, group)
    if bool((first[unit] == group).all()):
        return first[torch.randperm(units, generator=generator)][unit]
    known = (group >= 0).nonzero().flatten()
    mixed = group.clone()
    mixed[known] = group[known[torch.randperm(len(known), generator=generator)]]
    return mixed
