"""Fault: a router whose scores are so close that rounding decides."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moeify.inspect.faults.finding import Finding
from moeify.inspect.faults.observed import Observed

STEP = torch.finfo(torch.bfloat16).eps


def undecided_router(seen: Observed) -> Iterator[Finding]:
    """For half of the tokens the k-th largest logit and the next one are the same but for rounding.

    They differ by less than one rounding step of bf16, 2^-7 of their size, so that a change of dtype or of kernel
    chooses other experts. A router that starts as a constant and never moved looks like this, and so does one whose
    selection bias alone chooses.
    """
    for name, (logits, k) in seen.logits.items():
        if not 0 < k < logits.shape[-1]:
            continue
        best = logits.topk(k + 1, dim=-1).values
        chosen, left = best[:, k - 1], best[:, k]
        close = float((chosen - left <= STEP * chosen.abs()).float().mean())
        if close >= 0.5:
            yield Finding(
                layer=name,
                cause="the router's scores are so close that rounding decides",
                evidence=f"for {close:.0%} of {len(logits)} tokens rounding decides which logit is the k-th; the "
                f"median difference of logits there is {float((chosen - left).median()):.2g}",
                fix="initialise the router at random (std 0.02) and see that it learns: its learning rate, its "
                "gradient",
            )
