"""Panel: the tokens that are most over-represented among the rows of each expert."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from moeify.inspect.panels.attributes import quoted
from moeify.inspect.panels.charts import Choice, Heatmap
from moeify.inspect.panels.counting import choosing, labels, spread
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table
from moeify.inspect.trace import LayerTrace, Trace

_LAYERS, _ROWS, _TOKENS = 16, 3000, 6
_LEAST = 4


def top_tokens(trace: Trace) -> Panel:
    """The tokens of each expert with the largest rows · log(lift), of those with four rows or more at the expert.

    Lift is a token's share of the expert's rows over its share of all rows.

    Raises:
        NotMeasured: the trace has no token ids.
    """
    layers = [layer for layer in choosing(trace) if layer.tokens.ids is not None]
    if not layers:
        raise NotMeasured("the trace does not have the ids of its tokens; record it by moeify trace with the text")
    shown = [layers[i] for i in spread(len(layers), _LAYERS)]
    short = labels(layers)
    rows, charts, purity, busiest = [], {}, {}, {}
    most = max(1, _ROWS // len(shown))
    for layer in shown:
        counts, words = _counts(layer)
        found = _best(counts, words)
        purity[layer.name] = _purity(counts)
        busiest[layer.name] = float(counts.sum(0).max() / counts.sum().clamp_min(1))
        rows += [(short[layer.name], expert, share, text) for expert, share, text in found[:most]]
        charts[short[layer.name]] = _chart(counts, words)
    notes = [f"Tokens seen fewer than {_LEAST} times are left out of the table."]
    if len(shown) < len(layers):
        notes.append(f"{len(shown)} of {len(layers)} layers, evenly spread.")
    return Panel(
        title="Top tokens",
        question="Which tokens does each expert get? The 24 most frequent tokens are drawn, the table has the typical "
        "ones.",
        picture=Choice(label="layer", charts=charts, first=short[max(purity, key=purity.__getitem__)]),
        table=Table(("layer", "expert", "share of the layer's rows", "typical tokens (times their rate)"), rows),
        advice=_advice(purity, busiest), notes=tuple(notes),
    )  # fmt: skip


def _counts(layer: LayerTrace) -> tuple[Int[Tensor, "V E"], list[str]]:
    """Rows by token and expert, frequent tokens first, and the tokens' text."""
    assert layer.tokens.ids is not None
    ids, place, often = layer.tokens.ids.long().unique(return_inverse=True, return_counts=True)
    order = often.argsort(descending=True, stable=True)
    there = layer.experts >= 0
    cell = place.unsqueeze(1) * layer.num_experts + layer.experts.long().clamp_min(0)
    rows = cell[there].bincount(minlength=len(ids) * layer.num_experts).view(len(ids), -1)
    words = [quoted(layer.tokens, i) for i in ids[order].tolist()]
    return rows[order], words


def _best(counts: Int[Tensor, "V E"], words: list[str]) -> list[tuple[int, str, str]]:
    """Expert, its share of the rows, and its typical tokens with their lift."""
    rows = counts.float()
    rate = rows.sum(1, keepdim=True) / rows.sum().clamp_min(1)
    lift = rows / rows.sum(0).clamp_min(1) / rate.clamp_min(1e-12)
    surprise = torch.where(rows >= _LEAST, rows * lift.clamp_min(1e-12).log(), 0.0)
    best = surprise.topk(min(_TOKENS, len(words)), dim=0)
    total = rows.sum()
    return [
        (
            expert,
            f"{float(rows[:, expert].sum() / total):.2%}",
            "  ".join(
                f"{words[t]} ×{float(lift[t, expert]):.1f}"
                for t, score in zip(best.indices[:, expert].tolist(), best.values[:, expert].tolist(), strict=True)
                if score > 0
            )
            or "none",
        )
        for expert in range(rows.shape[1])
    ]


def _chart(counts: Int[Tensor, "V E"], words: list[str]) -> Heatmap:
    most = counts[:24].float()
    share = most / most.sum(1, keepdim=True).clamp_min(1) * counts.shape[1]
    return Heatmap(values=share, rows=words[:24], row="token", unit="times the fair share", scale="ratio")


def _purity(counts: Int[Tensor, "V E"]) -> float:
    """The share of the rows that go to their token's own most frequent expert, over tokens seen often."""
    rows = counts[counts.sum(1) >= 5 * _LEAST].float()
    return float(rows.amax(1).sum() / rows.sum().clamp_min(1))


def _advice(purity: dict[str, float], busiest: dict[str, float]) -> Advice:
    most, least = max(purity, key=purity.__getitem__), min(purity, key=purity.__getitem__)
    finding = (
        f"A token's own favourite expert takes {purity[most]:.0%} of its rows in {most}, {purity[least]:.0%} in "
        f"{least}; the busiest expert of {most} takes {busiest[most]:.0%} of all rows."
    )
    if purity[most] > 0.6 and purity[most] > 2 * busiest[most]:
        return Advice(
            level="look", finding=finding,
            action="Replace the router of this layer by a lookup (moeify.routers.Lookup) in the next training, or "
            "prefetch "
            "its experts by token id before the layer runs.",
            gain="as good as Switch and BASE or better in its authors' language models, with no router to balance",
            source="arXiv 2106.04426; DeepSeek-V4 uses lookups in its first layers",
        )  # fmt: skip
    return Advice(
        level="fine", finding=finding, action="Name experts by these tokens only where a lift is above 3 and the share "
        "is not small.",
        gain="names for experts, no speed", source="the table below",
    )  # fmt: skip
