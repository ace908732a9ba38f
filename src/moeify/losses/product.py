"""Gating balance of MoLE: the product of mean gate weights, which keeps every expert of a dense mixture in use."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from moeify.losses.loads import probability
from moeify.routing import Routing


def log_product(routing: Routing) -> Float[Tensor, ""]:
    """-log Π_j q̄_j with q̄_j the mean probability of expert j over decisions (MoLE, arXiv 2404.13628, eqs. 14-15).

    E · log E for perfect balance; unbounded as a mean probability tends to 0. The paper takes the mean over the
    gates of all layers, here over the decisions (one per token, or per sequence) of each layer.

    Raises:
        ValueError: the decision keeps no scores.
    """
    return -probability(routing).mean(0).clamp_min(1e-20).log().sum()
