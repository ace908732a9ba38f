"""Panel: super experts: the few whose outputs have outliers on which the whole model depends."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.inspect.panels.charts import Heatmap
from moeify.inspect.panels.counting import padded, short, short_names
from moeify.inspect.panels.panel import Advice, NotMeasured, Panel, Table

_QUANTILE, _PART = 0.995, 0.1


def super_experts(largest: Mapping[str, Float[Tensor, "E"]]) -> Panel:
    """Experts whose largest output is above the 99.5 % quantile of all experts and a tenth of the largest.

    (Su et al., arXiv 2507.23279, section 3.) One of fewer than 200 experts is always above that quantile, and
    layers differ in scale, so it must be ten times the median of its own layer as well.

    Args:
        largest: max |output| of every expert, by layer.

    Raises:
        NotMeasured: no expert's outputs were seen.
    """
    values = torch.cat([*largest.values()]) if largest else torch.zeros(0)
    known = values[values.isfinite()]
    if not len(known):
        raise NotMeasured("the experts of this model cannot be called one by one, so their outputs are not known")
    limit = max(float(known.quantile(_QUANTILE)), _PART * float(known.max()))
    names = dict(zip(largest, short_names([*largest]), strict=True))
    found = [
        (name, expert, float(layer[expert]))
        for name, layer in largest.items()
        for expert in (layer >= max(limit, 10 * float(layer.nanmedian()))).nonzero().flatten().tolist()
    ]
    median = float(known.median())
    rows = [(names[name], expert, round(value, 2), f"×{value / median:.0f}") for name, expert, value in found]
    rows = rows or [("none", "none", round(float(known.max()), 2), f"×{float(known.max()) / median:.1f}")]
    return Panel(
        title="Super experts",
        question="Does the model depend on outliers in the outputs of a few experts?",
        picture=Heatmap(
            values=padded([layer / median for layer in largest.values()]), rows=list(names.values()),
            unit="times the median of all experts' largest outputs", scale="ratio",
        ),
        table=Table(("layer", "expert", "largest output", "over the median"), rows),
        advice=_advice(found, float(known.max()) / median, len(known)),
    )  # fmt: skip


def _advice(found: list[tuple[str, int, float]], peak: float, experts: int) -> Advice:
    if not found:
        return Advice(
            level="fine", finding=f"The largest output is {peak:.1f} times the median; no expert of {experts} stands "
            "out.",
            action="Nothing.", gain="none", source="criterion of arXiv 2507.23279, and ten times its layer's median",
        )  # fmt: skip
    places = short([f"{expert} in {name}" for name, expert, _ in found])
    return Advice(
        level="act",
        finding=f"{len(found)} of {experts} experts have outputs up to {peak:.0f} times the median: {places}.",
        action="Never prune, merge or coarsely quantise these experts; leave them out of every list that a score of "
        "load "
        "gives.",
        gain="pruning 3 of 6,144 experts made Qwen3-30B-A3B repeat itself; keeping them costs almost nothing",
        source="arXiv 2507.23279",
    )  # fmt: skip
