"""Fault: experts that receive almost no tokens."""

from __future__ import annotations

from collections.abc import Iterator

from moeify.inspect.faults.finding import Finding
from moeify.inspect.faults.observed import Observed
from moeify.statistics import DEAD, load


def dead_experts(seen: Observed) -> Iterator[Finding]:
    """An expert gets less than 1 % of an even share of the rows: it costs memory and learns almost nothing.

    Counted over all K choices of a token, before any capacity; checked only with 300 rows per expert or more, where an
    expert with no row has less than 1 % with 95 % confidence (the rule of three).
    """
    for name, rows in seen.loads.items():
        share = load(rows) * len(rows)
        dead = (share < DEAD).nonzero().flatten().tolist()
        if dead:
            yield Finding(
                layer=name,
                cause="experts are dead",
                evidence=f"{len(dead)} of {len(rows)} experts get less than {DEAD:.0%} of an even share of "
                f"{int(rows.sum())} rows: {', '.join(map(str, dead[:8]))}; the largest gets {float(share.max()):.1f} "
                "shares",
                fix="balance (SparseArguments(balance=1e-2), or a controller that moves a selection bias); what stays "
                "dead can be re-initialised from a busy expert, or pruned",
            )
