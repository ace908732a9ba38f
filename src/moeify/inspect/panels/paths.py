"""Panel: the paths of tokens through experts: which expert of the next layer follows which."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeify import statistics
from moeify.inspect.panels.charts import Choice, Heatmap, Lines, Stack
from moeify.inspect.panels.counting import ENOUGH, choosing, labels, spread
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table
from moeify.inspect.panels.unclear import too_little
from moeify.inspect.trace import LayerTrace, Trace

_MATRICES = 10


def paths(trace: Trace) -> Panel:
    """How well the first expert of a token in one layer predicts its first expert in the next.

    Raises:
        NotMeasured: no two layers see the same tokens.
    """
    layers = choosing(trace)
    pairs = [(a, b) for a, b in pairwise(layers) if a.tokens is b.tokens]
    if not pairs:
        raise NotMeasured("a path needs two sparse layers that see the same tokens")
    short = labels(layers)
    moves = [_moves(a, b) for a, b in pairs]
    bits = [float(statistics.information(rows)) for rows in moves]
    chance = [_chance(a, b) for a, b in pairs]
    ways = [f"{short[a.name]} to {short[b.name]}" for a, b in pairs]
    shown = spread(len(pairs), _MATRICES)
    charts = {ways[i]: _heatmap(moves[i], short[pairs[i][0].name], short[pairs[i][1].name]) for i in shown}
    first = max(shown, key=lambda i: bits[i] - chance[i])
    lines = Lines(
        x=ways, series={"found": bits, "shuffled (chance)": chance}, x_label="layers", y_label="bits per token"
    )
    notes = (f"Matrices of {len(shown)} of {len(pairs)} pairs of layers.",) if len(shown) < len(pairs) else ()
    return Panel(
        title="Paths across layers",
        question="Does the expert in one layer predict the expert in the next?",
        picture=Stack([lines, Choice(label="layers", charts=charts, first=ways[first])]),
        table=Table(("path of first experts", "tokens", "share"), _frequent(layers)),
        advice=_advice(pairs, bits, chance, ways), notes=notes,
    )  # fmt: skip


def _first(layer: LayerTrace) -> Int[Tensor, "T"]:
    return layer.experts[:, 0].long()


def _moves(one: LayerTrace, other: LayerTrace, order: Tensor | None = None) -> Float[Tensor, "E1 E2"]:
    """Tokens by the first expert in one layer and in another."""
    before, after = _first(one), _first(other)
    before = before if order is None else before[order]
    both = (before >= 0) & (after >= 0)
    cell = before[both] * other.num_experts + after[both]
    return cell.bincount(minlength=one.num_experts * other.num_experts).view(one.num_experts, -1).float()


def _chance(one: LayerTrace, other: LayerTrace) -> float:
    """The information that is left when tokens are shuffled between the layers: the mean of five times."""
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(one.experts), generator=generator) for _ in range(5)]
    return sum(float(statistics.information(_moves(one, other, order))) for order in orders) / len(orders)


def _heatmap(moves: Float[Tensor, "E1 E2"], before: str, after: str) -> Heatmap:
    rate = statistics.load(moves.sum(0))
    lift = statistics.load(moves) / rate.clamp_min(1e-9)
    empty = (moves.sum(1, keepdim=True) == 0) | (rate == 0)
    return Heatmap(
        values=lift.masked_fill(empty, torch.nan), rows=[*map(str, range(len(moves)))],
        row=f"expert in layer {before}", column=f"expert in layer {after}", unit="times its share", scale="ratio",
        zero="never", blank="expert without tokens",
    )  # fmt: skip


def _frequent(layers: list[LayerTrace], most: int = 20) -> list[tuple[str, int, str]]:
    """The most frequent paths through up to eight layers that see the same tokens."""
    table = layers[0].tokens
    same = [layer for layer in layers if layer.tokens is table]
    same = [same[i] for i in spread(len(same), 8)]
    found = Counter(map(tuple, torch.stack([_first(layer) for layer in same], 1).tolist()))
    return [(" › ".join(map(str, path)), n, f"{n / len(table):.2%}") for path, n in found.most_common(most)]


def _advice(
    pairs: list[tuple[LayerTrace, LayerTrace]], bits: list[float], chance: list[float], ways: list[str]
) -> Advice:
    excess = [b - c for b, c in zip(bits, chance, strict=True)]
    best = max(range(len(pairs)), key=excess.__getitem__)
    moves = _moves(*pairs[best])
    known = float(moves.amax(1).sum() / moves.sum().clamp_min(1))
    blind = float(moves.sum(0).amax() / moves.sum().clamp_min(1))
    finding = (
        f"From layer {ways[best]} the expert carries {excess[best]:.2f} bits about the next above chance: guessing "
    )
    finding += f"it is right for {known:.0%} of the tokens, without it for {blind:.0%}."
    rows = min(len(a.tokens) / max(a.num_experts, b.num_experts) for a, b in pairs)
    if rows < ENOUGH:
        return too_little(finding, rows)
    if known < 2 * blind or known < 0.3:
        return Advice(
            level="fine", finding=finding, action="Do not prefetch experts by the expert of the layer "
            "before.", gain="none",
            source="guesses are counted here",
        )  # fmt: skip
    return Advice(
        level="look", finding=finding,
        action="Prefetch the next layer's expert by this layer's when experts are streamed or offloaded.",
        gain=f"{known:.0%} of the first experts are fetched before they are needed, instead of {blind:.0%}",
        source="guesses are counted here, on the tokens that they were made from",
    )  # fmt: skip
