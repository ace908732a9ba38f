"""Splits: which hidden units of a dense network go to which expert; one file per method."""

from moeify.sparsify.split.clustered import clustered
from moeify.sparsify.split.coactivation import coactivated, measure_coactivation
from moeify.sparsify.split.gradient import independent, inner
from moeify.sparsify.split.measure import Measured, measure_importance, measure_token_importance
from moeify.sparsify.split.random import random
from moeify.sparsify.split.weights import by_weights, importance

__all__ = [
    "Measured", "by_weights", "clustered", "coactivated", "importance", "independent", "inner", "measure_coactivation",
    "measure_importance", "measure_token_importance", "random",
]  # fmt: skip
