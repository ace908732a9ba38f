"""Panel: rows that a capacity drops."""

from __future__ import annotations

import torch

from moeify import statistics
from moeify.inspect.panels.charts import Bars
from moeify.inspect.panels.counting import choosing, labels
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table
from moeify.inspect.trace import LayerTrace, Trace


def drops(trace: Trace) -> Panel:
    """Share of the rows that a capacity dropped, and of the tokens that lost all of theirs.

    Raises:
        NotMeasured: no layer has a capacity.
    """
    layers = [layer for layer in choosing(trace) if layer.dropped is not None]
    if not layers:
        raise NotMeasured("no layer has a capacity that drops rows, or the trace does not say which were dropped")
    names = labels(layers)
    rates = [float(statistics.drop_rate(layer.assigned, layer.counts)) for layer in layers]
    lost = [_lost(layer) for layer in layers]
    rows = [(names[x.name], f"{r:.2%}", f"{t:.2%}") for x, r, t in zip(layers, rates, lost, strict=True)]
    return Panel(
        title="Drops",
        question="Which share of the rows does the capacity drop, and which share of the tokens lose all rows?",
        picture=Bars(
            names=list(names.values()), series={"rows": rates, "tokens without any expert": lost}, x_label="layer",
            y_label="share dropped",
        ),
        table=Table(("layer", "rows", "tokens without any expert"), rows),
        advice=_advice(layers, rates),
    )  # fmt: skip


def _lost(layer: LayerTrace) -> float:
    assert layer.dropped is not None
    there = layer.experts >= 0
    gone = there.any(-1) & (~there | layer.dropped).all(-1)
    return float(gone.float().mean())


def _advice(layers: list[LayerTrace], rates: list[float]) -> Advice:
    worst = int(torch.tensor(rates).argmax())
    finding = f"At most {rates[worst]:.1%} of the rows are dropped, in {layers[worst].name}."
    if rates[worst] < 0.01:
        return Advice(
            level="fine", finding=finding, action="Nothing; Switch keeps the rate below 1%.", gain="none",
            source="arXiv 2101.03961, section 2.2",
        )  # fmt: skip
    busiest = max(float(statistics.max_violation(layer.assigned)) + 1 for layer in layers)
    return Advice(
        level="look" if rates[worst] < 0.1 else "act", finding=finding,
        action=f"Serve without a capacity, or with {busiest:.2f} times the mean load: "
        f"moeify.serve.serve_with(model, capacity={busiest:.2f}). In training raise the balance first.",
        gain=f"no dropped row on these tokens at a capacity of {busiest:.2f}",
        source="the load of the busiest expert here",
    )  # fmt: skip
