"""Backends: implementations of a sparse layer. All must agree with the reference, `compose`, gradients included."""

from moeify.backends.base import Backend
from moeify.backends.order import backend_names, choose, find_backend, register_backend, run
from moeify.backends.plain import compose

__all__ = ["Backend", "backend_names", "choose", "compose", "find_backend", "register_backend", "run"]
