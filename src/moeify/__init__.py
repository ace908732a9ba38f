"""Make any transformer sparse: tokens -> router -> dispatch -> experts -> combine."""

from moeify.context import Context
from moeify.moe import MoE
from moeify.record import record
from moeify.registry import register
from moeify.routing import Assignment, Mixture, Routing, assign, limit

__version__ = "0.1.0"
__all__ = ["Assignment", "Context", "Mixture", "MoE", "Routing", "assign", "limit", "record", "register"]
