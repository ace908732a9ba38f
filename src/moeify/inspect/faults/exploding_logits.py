"""Fault: router logits that have grown too large."""

from __future__ import annotations

from collections.abc import Iterator

from moeify.inspect.faults.finding import Finding
from moeify.inspect.faults.observed import Observed

LARGE = 32.0
"""From here on a bf16 logit is rounded to a multiple of 1/4, which changes a weight by up to exp(1/8) - 1 = 13 %."""


def exploding_logits(seen: Observed) -> Iterator[Finding]:
    """One token in a hundred or more has a logit above 32: the softmax saturates, and gradients vanish.

    From 32 on bf16 rounds a logit by up to 1/8, a weight by 13 %; a softmax over a gap of 17 is 1 in fp32 and passes no
    gradient on. The z-loss (ST-MoE, arXiv 2202.08906, section 3.3) is for this.
    """
    for name, (logits, _) in seen.logits.items():
        largest = logits.abs().amax(-1)
        share = float((largest > LARGE).float().mean())
        if share >= 0.01:
            yield Finding(
                layer=name,
                cause="the router's logits have exploded",
                evidence=f"{share:.0%} of the tokens have a logit above {LARGE:g}; the median of the largest is "
                f"{float(largest.median()):.3g}, the maximum {float(largest.max()):.3g}",
                fix="train with a z-loss (SparseArguments(z=1e-3)), a lower learning rate or weight decay for the "
                "router",
            )
