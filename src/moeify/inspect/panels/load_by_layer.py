"""Panel: the load of every expert in every layer, over all tokens, and in prefill and decoding separately."""

from __future__ import annotations

from moeify import statistics
from moeify.inspect.panels.charts import Choice, Heatmap
from moeify.inspect.panels.counting import ENOUGH, choosing, labels, padded, rows_per_expert, shares, short
from moeify.inspect.panels.panel import Advice, Panel, Table
from moeify.inspect.panels.unclear import too_little
from moeify.inspect.trace import DECODE, PREFILL, LayerTrace, Trace


def load_by_layer(trace: Trace) -> Panel:
    """Rows that the router assigns to every expert, over the fair share of 1/E.

    Raises:
        NotMeasured: no layer sends tokens to experts.
    """
    parts = by_phase(trace)
    names = labels(choosing(trace))
    views = {name: _heatmap(choosing(part)) for name, part in parts.items()}
    rows = []
    for name, part in parts.items():
        for layer in choosing(part):
            share = shares(layer.assigned)
            rows.append((
                name, names[layer.name], len(layer.tokens), int(share.argmax()), round(float(share.max()), 2),
                round(float(share.min()), 2), round(float(statistics.load_entropy(layer.assigned)), 3),
            ))  # fmt: skip
    heading = ("tokens", "layer", "count", "busiest expert", "its load", "least load", "entropy / log E")
    return Panel(
        title="Load",
        question="Which experts get how many tokens? 1 is the fair share, 2 twice as much.",
        picture=Choice(label="tokens", charts=views),
        table=Table(heading, rows),
        advice=_advice(choosing(trace)),
    )


def by_phase(trace: Trace) -> dict[str, Trace]:
    """The trace, and if it has both phases, prefill and decoding separately."""
    parts = {"all": trace}
    phases = [table.phase for table in trace.tables]
    if all(phase is not None and {PREFILL, DECODE} <= set(phase.unique().tolist()) for phase in phases):
        for name, phase in (("prefill", PREFILL), ("decoding", DECODE)):
            parts[name] = trace.where(lambda tokens, phase=phase: tokens.need("phase") == phase)
    return parts


def _heatmap(layers: list[LayerTrace]) -> Heatmap:
    return Heatmap(
        values=padded([shares(layer.assigned) for layer in layers]),
        rows=list(labels(layers).values()), unit="times the fair share", scale="ratio",
    )  # fmt: skip


def _advice(layers: list[LayerTrace]) -> Advice:
    busiest = max(layers, key=lambda layer: float(shares(layer.assigned).max()))
    peak = float(shares(busiest.assigned).max())
    found = (
        f"The busiest expert, {int(busiest.assigned.argmax())} in {busiest.name}, gets {peak:.1f} times its fair share."
    )
    if (rows := rows_per_expert(layers)) < ENOUGH:
        return too_little(found, rows)
    used = {layer.name: float(1 / statistics.load(layer.assigned.float()).square().sum()) for layer in layers}
    if collapsed := [layer.name for layer in layers if used[layer.name] <= layer.num_experts / 2]:
        worst, experts = min(collapsed, key=used.__getitem__), {layer.name: layer.num_experts for layer in layers}
        return Advice(
            level="act",
            finding=f"The routing has collapsed in {short(collapsed)}: {used[worst]:.1f} of "
            f"{experts[worst]} experts are in use in {worst}. {found}",
            action="Look for the cause first: moeify doctor --model, with the training's log if there is one. Then "
            "balance: a larger balance loss (SparseArguments(balance=1e-2)), or a controller that moves a selection "
            "bias.",
            gain="the experts that you pay memory for; the demo's busiest expert went from 3.8 times its fair share to "
            "1.12 at the same loss within noise",
            source="in use: 1 / Σ f², collapsed at half of them; claims/results/demo_balance.csv",
        )  # fmt: skip
    source = "median of H100 timings with vLLM 0.24, loads of power 1.2 against even ones (AIConfigurator 0.12)"
    if peak < 1.5:
        return Advice(
            level="fine", finding=found, action="Leave it: placing experts by load would bring nothing.",
            gain="none; at a peak of 1.5 rebalancing brought 0%", source="plumb-moe 0.1 on DeepSeek-V2-Lite",
        )  # fmt: skip
    if peak < 3:
        return Advice(
            level="look", finding=found,
            action="Raise the balance loss, or add a controller (moeify.balance.Sign), if you train with expert "
            "parallelism; on one device an uneven load costs little.",
            gain="up to 1.29 times the speed of an MoE layer on 2 ranks, 1.65 on 8", source=source,
        )  # fmt: skip
    return Advice(
        level="act", finding=found,
        action="Train with a balance loss or a controller; serve with expert placement by load (EPLB), for the peak is "
        "above 3.",
        gain="1.65 times the speed of an MoE layer on 8 ranks, 2.08 on 32; +57% throughput at a peak of 6.7 (OLMoE)",
        source=f"{source}; plumb-moe 0.1 for the throughput and its gate of 3",
    )  # fmt: skip
