"""Panel: what experts specialise in: domain or language, modality, script, position, phase or single tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moeify import statistics
from moeify.inspect.panels.attributes import Groups, attributes
from moeify.inspect.panels.bits import Bits, information_bits, units_of
from moeify.inspect.panels.charts import Bars, Chart, Choice, Heatmap, Stack
from moeify.inspect.panels.counting import choosing, labels, rows_by_group, spread
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table
from moeify.inspect.trace import LayerTrace, Trace

_LAYERS = 16
_SAYS = {
    "domain": "domain of a text or sample, such as its language or class, as the data name it",
    "script": "script of the token's letters, such as Latin or Cyrillic, or its kind of character",
    "token": "token itself, one of the 32 most frequent",
}


def specialisation(trace: Trace) -> list[Panel]:
    """One panel for each attribute of the tokens that the trace has.

    Raises:
        NotMeasured: it has none, or no layer sends tokens to experts.
    """
    layers = choosing(trace)
    names = list(dict.fromkeys(name for layer in layers for name in attributes(layer.tokens)))
    if not names:
        raise NotMeasured("the trace has neither domain, modality, position nor text of its tokens")
    return [_panel(layers, name) for name in names]


def _panel(layers: list[LayerTrace], name: str) -> Panel:
    by_table = {id(layer.tokens): attributes(layer.tokens).get(name) for layer in layers}
    found = [(layer, groups) for layer in layers if (groups := by_table[id(layer.tokens)]) is not None]
    shown = [found[i] for i in spread(len(found), _LAYERS)]
    bits = {layer.name: information_bits(layer, groups, units_of(layer.tokens)) for layer, groups in shown}
    short = labels([layer for layer, _ in found])
    what = _SAYS.get(name, name)
    notes = [
        f"Interval: bootstrap over {min(b.units for b in bits.values())} sequences or stretches of tokens, paired, "
        "seed 0."
    ]
    if len(shown) < len(found):
        notes.append(f"{len(shown)} of {len(found)} layers, evenly spread.")
    rows = [
        (short[layer], *(round(v, 4) for v in (b.found, b.chance, b.excess, b.low, b.high)))
        for layer, b in bits.items()
    ]
    return Panel(
        title=f"Specialisation by {name}",
        question=f"Does the expert predict the {what}? Information in bits per row, beside that of shuffled groups.",
        picture=Stack([_bars(bits, short), _lifts(name, shown, short, _best(bits))]),
        table=Table(("layer", "bits", "bits of chance", "difference", "2.5%", "97.5%"), rows),
        advice=_advice(name, bits, shown), notes=tuple(notes),
    )  # fmt: skip


def _bars(bits: dict[str, Bits], short: dict[str, str]) -> Chart:
    return Bars(
        names=[short[layer] for layer in bits], x_label="layer", y_label="bits per row",
        series={
            "above chance": [b.excess for b in bits.values()],
            "shuffled (chance)": [b.chance for b in bits.values()],
        },
        interval={"above chance": ([b.low for b in bits.values()], [b.high for b in bits.values()])},
    )  # fmt: skip


def _lifts(name: str, shown: list[tuple[LayerTrace, Groups]], short: dict[str, str], first: str) -> Chart:
    charts = {
        short[layer.name]: Heatmap(
            values=lift(layer, groups), rows=[*groups.names], row=name,
            unit="times as often as over all tokens", scale="ratio", zero="never", blank="expert without tokens",
        )
        for layer, groups in shown
    }  # fmt: skip
    return Choice(label="layer", charts=charts, first=short[first])


def lift(layer: LayerTrace, groups: Groups) -> Float[Tensor, "G E"]:
    """Share of an expert among the rows of a group over its share among all rows; NaN where it has no row."""
    rows = rows_by_group(layer, groups.of, len(groups.names)).float()
    return statistics.load(rows) / torch.where(rows.sum(0) > 0, statistics.load(rows.sum(0)), torch.nan)


def _best(bits: dict[str, Bits]) -> str:
    """The layer whose experts carry most about the groups."""
    return max(bits, key=lambda layer: bits[layer].excess)


def _advice(name: str, bits: dict[str, Bits], shown: list[tuple[LayerTrace, Groups]]) -> Advice:
    best = _best(bits)
    found = bits[best]
    clear = sum(b.low > 0 for b in bits.values())
    interval = f"(95%: {found.low:.3f} to {found.high:.3f})"
    finding = (
        f"In {best} an expert carries {found.excess:.3f} bits about the {name} above chance {interval}; "
        f"{clear} of {len(bits)} layers are above chance."
    )
    if found.units < 8:
        return Advice(
            level="unknown", finding=finding, action="Record eight sequences or more.", gain="an interval that holds",
            source="a bootstrap of fewer units is too narrow",
        )  # fmt: skip
    if not clear:
        return Advice(
            level="fine", finding=finding, action=f"Do not read the heatmap: its colours are noise. Choose experts by "
            f"load, not by {name}.",
            gain="none", source="the interval holds 0",
        )  # fmt: skip
    if name in ("domain", "modality"):
        groups = max(shown, key=lambda pair: bits[pair[0].name].excess)
        share = _cover(*groups)
        return Advice(
            level="look", finding=finding,
            action=f"To fine-tune on one {name}, train only the experts that serve it (ESFT): here {share:.0%} of "
            "them take "
            f"half of its rows in {best}. Do not prune the others: they are rarely unused.",
            gain="up to 90% less storage and 30% less training time than full fine-tuning",
            source="ESFT, arXiv 2407.01906; the share is measured here",
        )  # fmt: skip
    return Advice(
        level="fine", finding=finding,
        action="Use it as a hint for a cache of experts. Where experts seem to follow a domain, a part of that may be "
        f"the {_SAYS.get(name, name)}.",
        gain="none by itself; in three models experts follow the type of token more than its topic, 1.6 to 2.3 times "
        "at most",
        source="J. S. Lopez 2026, doi 10.5281/zenodo.19457411: OLMoE, Qwen1.5-MoE, DeepSeekMoE-16B",
    )  # fmt: skip


def _cover(layer: LayerTrace, groups: Groups) -> float:
    """The share of the experts that take half of the rows of a group, in the mean over groups."""
    rows = rows_by_group(layer, groups.of, len(groups.names)).float()
    sums = statistics.load(rows.sort(dim=-1, descending=True).values).cumsum(-1)
    return float(((sums < 0.5).sum(-1) + 1).float().mean()) / layer.num_experts
