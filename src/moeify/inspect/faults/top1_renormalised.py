"""Fault: one expert per token, with a weight that is always 1."""

from __future__ import annotations

from collections.abc import Iterator

from moeify.inspect.faults.finding import Finding, Inapplicable, NotGiven, Unknown
from moeify.inspect.faults.observed import Observed


def top1_renormalised(seen: Observed) -> Iterator[Finding]:
    """With k = 1 and weights divided by their sum, every weight is the same constant: the router learns nothing.

    Constant means within 1e-6, some rounding steps of fp32. The gradient of the task is then rounding too, below 1e-8
    (a Mixtral block: 1.2e-9 with k = 1, 5.4e-3 with k = 2); Switch (arXiv 2101.03961, eq. 2) keeps the probability as
    the weight for this reason.
    """
    layers = [layer for layer in seen.trace if layer.k == 1]
    if not layers:
        raise Inapplicable("every token has more than one expert")
    for layer in layers:
        if layer.num_experts == 1:
            continue
        if layer.weights is None:
            raise Unknown("the trace has no weights")
        used = layer.weights[layer.weights > 0].float()
        if len(used) and float(used.max() - used.min()) <= 1e-6 * float(used.mean()):
            yield Finding(
                layer=layer.name,
                cause="k = 1 with renormalised weights: the router gets no gradient from the task",
                evidence=f"all {len(used)} weights are {float(used.mean()):.3f}{_gradient(seen, layer.name)}",
                fix="keep the probability as the weight (norm_topk_prob=False, TopK(k=1, normalize=False)), or use k "
                "= 2",
            )


def _gradient(seen: Observed, name: str) -> str:
    try:
        found = seen.gradients.get(name)
    except (Unknown, NotGiven):
        return ""
    return "" if found is None or found.router is None else f"; gradient of the router {found.router:.1e}"
