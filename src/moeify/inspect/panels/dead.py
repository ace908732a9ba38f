"""Panel: dead experts, which get almost no tokens."""

from __future__ import annotations

from moeify import statistics
from moeify.inspect.panels.charts import Bars
from moeify.inspect.panels.counting import ENOUGH, choosing, labels, rows_per_expert, short
from moeify.inspect.panels.load_by_layer import by_phase
from moeify.inspect.panels.panel import Advice, Panel, Table
from moeify.inspect.panels.unclear import too_little
from moeify.inspect.trace import LayerTrace, Trace


def dead(trace: Trace) -> Panel:
    """The number of experts of every layer whose load is below 1 % of the mean load.

    Raises:
        NotMeasured: no layer sends tokens to experts.
    """
    layers = choosing(trace)
    names = labels(layers)
    parts = {kind: {layer.name: _dead(layer) for layer in choosing(part)} for kind, part in by_phase(trace).items()}
    series = {kind: [float(len(found.get(name, []))) for name in names] for kind, found in parts.items()}
    rows = [(names[name], len(found), short([*map(str, found)], 12) or "none") for name, found in parts["all"].items()]
    return Panel(
        title="Dead experts",
        question="Which experts get no tokens, or fewer than 1% of the mean?",
        picture=Bars(names=list(names.values()), series=series, x_label="layer", y_label="dead experts"),
        table=Table(("layer", "dead", "which"), rows),
        advice=_advice(layers, parts["all"]),
    )


def _dead(layer: LayerTrace) -> list[int]:
    load = statistics.load(layer.assigned) * layer.num_experts
    return (load < statistics.DEAD).nonzero().flatten().tolist()


def _advice(layers: list[LayerTrace], found: dict[str, list[int]]) -> Advice:
    count, total = sum(map(len, found.values())), sum(layer.num_experts for layer in layers)
    where = short([name for name, experts in found.items() if experts])
    finding = f"{count} of {total} experts are dead, in {where}." if count else f"None of {total} experts is dead."
    rows = rows_per_expert(layers)
    if count and rows < ENOUGH:
        return too_little(finding, rows)
    if not count:
        return Advice(
            level="fine", finding=finding, action="Nothing.", gain="none", source="every expert was seen with tokens"
        )
    return Advice(
        level="act", finding=finding,
        action="In training: raise the balance loss or add a controller, and check that padding is masked. In a "
        "finished "
        "model: prune the dead experts after you have measured on the data that you serve.",
        gain=f"{count / total:.0%} of the expert parameters, at no cost on data like these",
        source="counted here: a pruned expert computed nothing on these tokens",
    )  # fmt: skip
