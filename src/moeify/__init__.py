"""Make any transformer sparse: tokens -> router -> dispatch -> experts -> combine."""

__version__ = "0.1.0"

from moeify.capacity import limit
from moeify.context import Context
from moeify.moe import MoE
from moeify.record import record
from moeify.registry import register
from moeify.routing import Assignment, Evidence, Mixture, Routing, assign
from moeify.sparsify import Recipe, from_adapters, load, load_adapters, merge_models, save, save_adapters, sparsify

__all__ = [
    "Assignment",
    "Context",
    "Evidence",
    "Mixture",
    "MoE",
    "Recipe",
    "Routing",
    "assign",
    "from_adapters",
    "limit",
    "load",
    "load_adapters",
    "merge_models",
    "record",
    "register",
    "save",
    "save_adapters",
    "sparsify",
]  # fmt: skip
