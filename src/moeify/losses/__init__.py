"""Losses as plain functions of a routing decision, of a router's weight, or of expert outputs.

Each is of one layer; average them over layers. Padding is not part of a decision, so it is not part of a loss.
"""

from moeify.losses.compete import distillation, diversity
from moeify.losses.cost import budget, cost
from moeify.losses.experts import cosine, erc, linear_cka, orthogonality, proxies, similarity
from moeify.losses.loads import (
    Scope,
    balance,
    cv_squared,
    group_balance,
    importance,
    load_loss,
    probability,
    score_importance,
    sequence_balance,
    share,
)
from moeify.losses.localized import localized
from moeify.losses.product import log_product
from moeify.losses.scores import global_entropy, l1, local_entropy, z
from moeify.losses.supervision import supervision
from moeify.losses.top_any import diversity_and_simplicity

__all__ = [
    "Scope", "balance", "budget", "cosine", "cost", "cv_squared", "distillation", "diversity",
    "diversity_and_simplicity", "erc", "global_entropy", "group_balance", "importance", "l1", "linear_cka",
    "load_loss", "local_entropy", "localized", "log_product", "orthogonality", "probability", "proxies",
    "score_importance", "sequence_balance", "share", "similarity", "supervision", "z",
]  # fmt: skip
