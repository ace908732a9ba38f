"""Conformance tests for custom routers, experts and backends: the invariants ("laws") of each; no pytest needed."""

from moeify.testing.backends import check_backend
from moeify.testing.experts import check_experts
from moeify.testing.laws import BrokenLaw
from moeify.testing.routers import check_router

__all__ = ["BrokenLaw", "check_backend", "check_experts", "check_router"]
