"""Panel: texts whose tokens have the colour of their expert."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from moeify.inspect.panels.charts import Choice, ColouredText, visible
from moeify.inspect.panels.counting import choosing, labels, spread
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table
from moeify.inspect.trace import LayerTrace, Tokens, Trace

_TEXTS, _TOKENS, _CELLS = 4, 300, 400_000


def coloured_text(trace: Trace) -> Panel:
    """Some texts, each token in the colour of its first expert, layer by layer.

    Raises:
        NotMeasured: the trace has no text of its tokens.
    """
    layers = [layer for layer in choosing(trace) if layer.tokens.ids is not None and layer.tokens.vocabulary]
    if not layers:
        raise NotMeasured("the trace does not have the text of its tokens; record it with a tokenizer")
    table = layers[0].tokens
    layers = [layer for layer in layers if layer.tokens is table]
    k = max(layer.k for layer in layers)
    texts = _texts(table, min(_TOKENS, max(32, _CELLS // (len(layers) * k * _TEXTS))))
    charts = {name: _chart(layers, places) for name, places in texts.items()}
    rows = [
        (name, len(places), _changes(layers[0], places), _changes(layers[-1], places)) for name, places in texts.items()
    ]
    return Panel(
        title="Coloured text",
        question="Which expert serves which token? Equal colours in one text are the same first expert.",
        picture=Choice(label="text", charts=charts),
        table=Table(("text", "tokens", "changes of expert, first layer", "last layer"), rows),
        advice=Advice(
            level="fine", finding=f"{len(texts)} of {len(_starts(table))} texts, {sum(map(len, texts.values()))} "
            "tokens.",
            action="Look for experts that follow spelling or punctuation rather than meaning, and compare with the "
            "panel "
            "Specialisation by token.",
            gain="none by itself; it shows examples of what the numbers measure", source="the trace",
        ),
    )  # fmt: skip


def _starts(table: Tokens) -> list[Int[Tensor, "tokens"]]:
    """The indices of the tokens of every sequence."""
    if table.sequence is None:
        return [torch.arange(len(table))]
    return [(table.sequence == s).nonzero().flatten() for s in table.sequence.unique()]


def _texts(table: Tokens, longest: int) -> dict[str, Int[Tensor, "tokens"]]:
    """One text per domain, or the first few texts, by name."""
    found = _starts(table)
    if table.domain is not None:
        of = [int(table.domain[places[0]]) for places in found]
        first = dict(reversed([*zip(of, found, strict=True)]))
        chosen = sorted(domain for domain in first if domain >= 0)
        return {table.domains[d]: first[d][:longest] for d in (chosen[i] for i in spread(len(chosen), _TEXTS))}
    return {f"{i + 1}": found[i][:longest] for i in spread(len(found), _TEXTS)}


def _chart(layers: list[LayerTrace], places: Int[Tensor, "tokens"]) -> ColouredText:
    table, k = layers[0].tokens, max(layer.k for layer in layers)
    assert table.ids is not None
    experts = torch.full((len(layers), len(places), k), -1)
    weights = torch.full((len(layers), len(places), k), float("nan"))
    for i, layer in enumerate(layers):
        experts[i, :, : layer.k] = layer.experts[places].long()
        if layer.weights is not None:
            weights[i, :, : layer.k] = layer.weights[places].float()
    return ColouredText(
        tokens=[shown(table.vocabulary.get(i, f"[{i}]")) for i in table.ids[places].tolist()],
        layers=list(labels(layers).values()), experts=experts,
        weights=None if bool(weights.isnan().all()) else weights,
        num_experts=[layer.num_experts for layer in layers],
    )  # fmt: skip


def shown(token: str) -> str:
    """The displayed text of a token: line ends get a mark; an empty token is ∅."""
    return visible(token).replace("\n", "↵\n").replace("\t", "⇥\t") or "∅"


def _changes(layer: LayerTrace, places: Int[Tensor, "tokens"]) -> str:
    """How often the first expert changes from one token to the next."""
    first = layer.experts[places, 0]
    return f"{float((first[1:] != first[:-1]).float().mean()):.0%}" if len(first) > 1 else "none"
