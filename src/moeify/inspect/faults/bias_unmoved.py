"""Fault: a selection bias that no controller moves."""

from __future__ import annotations

from collections.abc import Iterator

from moeify.inspect.faults.finding import Finding, Inapplicable, NotGiven, Unknown
from moeify.inspect.faults.observed import Observed


def bias_unmoved(seen: Observed) -> Iterator[Finding]:
    """Every selection bias of a layer is the same number: loss-free balancing was never run, or was not saved.

    A controller moves every bias in every step unless its load is exactly even (arXiv 2408.15664, algorithm 1).
    transformers has the bias of DeepSeek-V3 and GLM, and never moves it. A bias that is equal for all experts changes
    no choice.
    """
    biases = {name: list(layer.selection_biases()) for name, layer in seen.layers.items()}
    if not any(biases.values()):
        raise Inapplicable("no router has a selection bias")
    for name, found in biases.items():
        for owner, key in found:
            value = getattr(owner, key).float()
            if value.is_meta:
                raise Unknown("the model holds no weights")
            if not (value.max() > value.min()) and not _will_move(seen):
                yield never_moved(name, f"{key} is {float(value.flatten()[0]):g} for all {value.numel()} experts")


def never_moved(layer: str, evidence: str) -> Finding:
    """The finding, of a model or of a log."""
    return Finding(
        layer=layer,
        cause="the selection bias has never moved",
        evidence=evidence,
        fix="train with a controller, SparseArguments(controller=Sign()), or moeify.balance.control(model, optimizer, "
        "Sign()); see that checkpoints keep the bias",
    )


def _will_move(seen: Observed) -> bool:
    try:
        return bool(seen.training.moves_biases)
    except NotGiven:
        return False
