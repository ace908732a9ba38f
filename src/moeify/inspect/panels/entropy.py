"""Panel: how confident routers are: the entropy of their scores."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from moeify import statistics
from moeify.inspect.panels.charts import Lines
from moeify.inspect.panels.counting import labels, quantiles
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table
from moeify.inspect.trace import LayerTrace, Trace


def scored(trace: Trace) -> list[LayerTrace]:
    """The layers of which the trace has the scores of all experts.

    Raises:
        NotMeasured: the trace has no such layer.
    """
    layers = [layer for layer in trace if layer.scores is not None and layer.num_experts > 1]
    if not layers:
        raise NotMeasured("the trace has no scores of all experts: its routers keep none, or it was recorded without")
    if not (layers := [layer for layer in layers if layer.k]):
        raise NotMeasured("Soft MoE chooses no experts; its slots have an entropy of their own")
    return layers


def entropy(trace: Trace) -> Panel:
    """Entropy of the normalised scores over log E, by layer: mean, and the range of the middle 80 % of the tokens.

    Raises:
        NotMeasured: the trace has no scores.
    """
    layers = scored(trace)
    names = labels(layers)
    entropies = {layer.name: _entropy(layer) for layer in layers}
    means = {name: float(values.mean()) for name, values in entropies.items()}
    bounds = {name: quantiles(values, 0.1, 0.9) for name, values in entropies.items()}
    low, high = ([bound[i] for bound in bounds.values()] for i in range(2))
    rows = [(names[name], *(round(v, 3) for v in (means[name], *bounds[name]))) for name in names]
    return Panel(
        title="Router entropy",
        question="How confident is the router? 0: all probability on one expert; 1: uniform over the experts.",
        picture=Lines(
            x=list(names.values()), series={"mean": [*means.values()]}, band={"mean": (low, high)}, x_label="layer",
            y_label="entropy / log E, band: middle 80% of the tokens",
        ),
        table=Table(("layer", "mean", "10%", "90%"), rows),
        advice=_advice(means),
    )  # fmt: skip


def _entropy(layer: LayerTrace) -> Float[Tensor, "T"]:
    assert layer.scores is not None
    return statistics.router_entropy(layer.scores.float().clamp_min(0)) / statistics.log_experts(layer.num_experts)


def _advice(means: dict[str, float]) -> Advice:
    highest, lowest = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    finding = f"The entropy lies between {means[lowest]:.2f} ({lowest}) and {means[highest]:.2f} of log E ({highest})."
    if means[lowest] < 0.02:
        return Advice(
            level="act", finding=finding,
            action="Add a z-loss (SparseArguments(z=1e-3)) and compute the router in fp32: scores this sharp pass "
            "almost no gradient to the experts that are not chosen.",
            gain="3 of 3 runs stable with the z-loss, 4 of 6 without; for the entropy itself no number is known",
            source="ST-MoE, arXiv 2202.08906, table 4",
        )  # fmt: skip
    if means[highest] > 0.98:
        return Advice(
            level="look", finding=finding,
            action="Check in the margin panel and over training whether the router learns: look for a router that is "
            "frozen, in half precision, or under a balance loss that is too strong.",
            gain="unknown until the cause is; a router that does not learn makes experts one large random ensemble",
            source="moeify doctor --model names the cause",
        )  # fmt: skip
    return Advice(
        level="fine", finding=finding, action="Nothing.", gain="none", source="neither saturated nor undecided"
    )
