"""Fault: experts that receive almost no tokens."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Int
from torch import Tensor

from moeify.inspect.faults.finding import Finding
from moeify.inspect.faults.observed import Observed
from moeify.statistics import DEAD, load


def dead_experts(seen: Observed) -> Iterator[Finding]:
    """An expert gets less than 1 % of an even share of the rows: it costs memory and learns almost nothing.

    Counted over all K choices of a token, before any capacity; checked only with 300 rows per expert or more, where an
    expert with no row has less than 1 % with 95 % confidence (the rule of three).
    """
    for name, rows in seen.loads.items():
        if bool((load(rows) * len(rows) < DEAD).any()):
            yield dead(name, rows)


def dead(layer: str, rows: Int[Tensor, "E"]) -> Finding:
    """The finding about a layer with dead experts.

    Args:
        layer: its name.
        rows: of every expert.
    """
    share = load(rows) * len(rows)
    which = (share < DEAD).nonzero().flatten().tolist()
    return Finding(
        layer=layer,
        cause="experts are dead",
        evidence=f"{len(which)} of {len(rows)} experts get less than {DEAD:.0%} of an even share of "
        f"{int(rows.sum())} rows: {', '.join(map(str, which[:8]))}; the largest gets {float(share.max()):.1f} shares",
        fix="balance (SparseArguments(balance=1e-2), or a controller that moves a selection bias); what stays "
        "dead can be re-initialised from a busy expert, or pruned",
    )
