"""Fault: a router that computes in bf16 or fp16."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.inspect.faults.finding import Finding
from moeify.inspect.faults.observed import Observed


def half_precision_router(seen: Observed) -> Iterator[Finding]:
    """All logits are 16-bit numbers: rounding decides between experts with close scores, in training and in serving.

    All logits are equal to themselves in bf16 or fp16, which happens by chance to one of 2^16 or 2^13 fp32 numbers.
    Switch (arXiv 2101.03961, section 2.4) computes the router alone in fp32, as do Megatron-Core and vLLM since.
    """
    _ = seen.model  # a trace rounds its logits
    for name, (logits, k) in seen.logits.items():
        rounded = next((kind for kind in (torch.bfloat16, torch.float16) if _is_of(logits, kind)), None)
        if rounded is not None:
            step = torch.finfo(rounded).eps
            yield Finding(
                layer=name,
                cause=f"the router computes in {str(rounded).removeprefix('torch.')}",
                evidence=f"all {logits.numel()} logits fit 16 bits; {_close(logits, k, step):.1%} of the tokens "
                "have experts that rounding could have chosen otherwise",
                fix="compute logits and scores in fp32 (routers of moeify do): router_dtype=fp32, or keep the router's "
                "weight in fp32 and cast its input",
            )


def _is_of(logits: Float[Tensor, "T E"], kind: torch.dtype) -> bool:
    finite = logits[logits.isfinite()].float()
    return bool((finite != 0).any()) and torch.equal(finite.to(kind).float(), finite)


def _close(logits: Float[Tensor, "T E"], k: int, step: float) -> float:
    """The share of tokens whose k-th and next logit are closer than one rounding step."""
    if k >= logits.shape[-1]:
        return 0.0
    best = logits.float().topk(k + 1, dim=-1).values
    return float((best[:, k - 1] - best[:, k] <= step * best[:, k - 1].abs()).float().mean())
