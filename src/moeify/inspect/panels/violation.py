"""Panel: load violation (MaxVio) over the whole trace, within micro-batches, in prefill and in decoding."""

from __future__ import annotations

import math

from moeify import statistics
from moeify.inspect.panels.charts import Bars
from moeify.inspect.panels.counting import ENOUGH, choosing, labels, rows_by_group, rows_per_expert
from moeify.inspect.panels.load_by_layer import by_phase
from moeify.inspect.panels.panel import Advice, Panel, Table
from moeify.inspect.panels.unclear import too_little
from moeify.inspect.trace import LayerTrace, Trace


def violation(trace: Trace) -> Panel:
    """MaxVio of every layer: its busiest expert's load over the fair share, minus 1 (arXiv 2408.15664, eq. 4).

    Raises:
        NotMeasured: no layer sends tokens to experts.
    """
    layers = choosing(trace)
    names = labels(layers)
    found: dict[str, dict[str, float]] = {"global batch": {x.name: _violation(x) for x in layers}}
    micro = {layer.name: _micro(layer) for layer in layers}
    if not all(map(math.isnan, micro.values())):
        found["micro batch, mean"] = micro
    for phase, part in list(by_phase(trace).items())[1:]:
        found[phase] = {layer.name: _violation(layer) for layer in choosing(part)}
    series = {kind: [values.get(layer.name, math.nan) for layer in layers] for kind, values in found.items()}
    rows = [(names[layer.name], *(round(values[i], 3) for values in series.values())) for i, layer in enumerate(layers)]
    return Panel(
        title="Violation (MaxVio)",
        question="How far above the fair share is the busiest expert? 0 is even, 1 twice the share, E - 1 one expert "
        "alone.",
        picture=Bars(names=list(names.values()), series=series, x_label="layer", y_label="MaxVio"),
        table=Table(("layer", *series), rows),
        advice=_advice(layers, found),
    )


def _violation(layer: LayerTrace) -> float:
    return float(statistics.max_violation(layer.assigned))


def _micro(layer: LayerTrace) -> float:
    """Mean over the micro-batches; NaN where there is one, or where they are not known."""
    batch = layer.tokens.batch
    if batch is None or int(batch.max()) < 1:
        return math.nan
    rows = rows_by_group(layer, batch, int(batch.max()) + 1)
    return float(statistics.max_violation(rows[rows.sum(-1) > 0]).mean())


def _advice(layers: list[LayerTrace], found: dict[str, dict[str, float]]) -> Advice:
    whole = found["global batch"]
    worst = max(whole, key=lambda name: whole[name])
    mean = sum(whole.values()) / len(whole)
    finding = f"MaxVio is {mean:.2f} in the mean over layers, {whole[worst]:.2f} in {worst}."
    if (rows := rows_per_expert(layers)) < ENOUGH:
        return too_little(finding, rows)
    if micro := found.get("micro batch, mean"):
        finding += f" Within a micro-batch it is {sum(micro.values()) / len(micro):.2f}."
    if whole[worst] < 0.5:
        return Advice(
            level="fine", finding=finding,
            action="Leave the balance as it is; a violation within micro-batches that is much larger is what "
            "specialised "
            "experts look like.",
            gain="none", source="the global batch is what capacity and placement see",
        )  # fmt: skip
    return Advice(
        level="look" if whole[worst] < 2 else "act", finding=finding,
        action="Move selection biases after each step (moeify.balance.Proportional or Sign), or take the balance loss "
        "over "
        "the global batch (SparseArguments(scope='global')).",
        gain="the demo's busiest expert went from 3.8 times its fair share to 1.12, at the same loss within noise",
        source="claims/results/demo_balance.csv, three seeds and three more",
    )  # fmt: skip
