"""Conformance checks for routers, experts and backends of your own: the laws that all must keep; no pytest needed."""

from moeify.testing.backends import check_backend
from moeify.testing.experts import check_experts
from moeify.testing.laws import BrokenLaw
from moeify.testing.routers import check_router

__all__ = ["BrokenLaw", "check_backend", "check_experts", "check_router"]
