"""Make any transformer sparse: tokens -> router -> dispatch -> experts -> combine."""

from moeify.capacity import limit
from moeify.compose import from_adapters, load_adapters, merge_models, save_adapters
from moeify.context import Context
from moeify.moe import MoE
from moeify.record import record
from moeify.registry import register
from moeify.routing import Assignment, Evidence, Mixture, Routing, assign
from moeify.sparsify import Recipe, sparsify
from moeify.store import load, save
from moeify.version import __version__ as __version__

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
