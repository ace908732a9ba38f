"""Fault: a selection bias that enters the weights of the chosen experts."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moeify.inspect.faults.finding import Finding, Inapplicable
from moeify.inspect.faults.observed import Observed
from moeify.routers.topk import sigmoid, softmax, sqrt_softplus
from moeify.routing import Choices

SCORES = (softmax, sigmoid, sqrt_softplus)


def biased_weights(seen: Observed) -> Iterator[Finding]:
    """The weights are proportional to scores *plus* the selection bias, which is for the choice of experts only.

    Loss-free balancing (arXiv 2408.15664, eq. 3; DeepSeek-V3, arXiv 2412.19437, eqs. 15-16) weighs by the scores alone.
    The share of a token's weights is compared with both; biased ones must be nearer by a factor of 10.
    """
    biases = {
        name: getattr(*found[0]).float()
        for name, layer in seen.layers.items()
        if (found := list(layer.selection_biases())) and getattr(*found[0]).any()
    }
    if not biases:
        raise Inapplicable("no router has a selection bias that is not 0")
    for name, decision in seen.decisions.items():
        if name not in biases or decision.choices is None or decision.logits is None or decision.choices.k < 2:
            continue
        plain, biased = (
            _misfit(decision.logits, decision.choices, 0),
            _misfit(decision.logits, decision.choices, biases[name]),
        )
        if plain > 1e-3 and biased < plain / 10:
            yield Finding(
                layer=name,
                cause="the selection bias is part of the experts' weights",
                evidence=f"shares of weights differ from those of the scores by {plain:.4f} on average, and from "
                f"those of scores + bias by {biased:.1e}",
                fix="choose by scores + bias, and gather the weights from the scores",
            )


def _misfit(logits: Float[Tensor, "T E"], choices: Choices, bias: Float[Tensor, "E"] | int) -> float:
    """How far the shares of the weights are from those of the scores, by the score function that comes closest."""
    weights = _share(choices.weights.float())
    shares = [_share((score(logits.float()) + bias).gather(-1, choices.indices)) for score in SCORES]
    return min(float((weights - share).abs().mean()) for share in shares)


def _share(values: Float[Tensor, "T K"]) -> Float[Tensor, "T K"]:
    return F.normalize(values, p=1.0, dim=-1)
