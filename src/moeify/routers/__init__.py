"""Routers: tokens -> `Routing`. One file per family of papers."""

from moeify.routers.base import Router
from moeify.routers.capacity import Capacity
from moeify.routers.topk import Groups, TopK, sigmoid, softmax, sqrt_softplus

__all__ = ["Capacity", "Groups", "Router", "TopK", "sigmoid", "softmax", "sqrt_softplus"]
