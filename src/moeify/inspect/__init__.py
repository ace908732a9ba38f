"""Diagnose a sparse model: expert load, collapse, causality, pictures, and an HTML report."""

from moeify.inspect.causality import Causality, Leak, check_causality
from moeify.inspect.collapse import (
    effective_rank,
    margin,
    output_similarity,
    overlap,
    participation_ratio,
    redundancy,
    representation_collapse,
    switched,
    weight_cosine,
    without_first,
)
from moeify.inspect.load import ExpertLoad, expert_load
from moeify.inspect.page import write_report
from moeify.inspect.panels.panel import Panel
from moeify.inspect.report import Report, report

__all__ = [
    "Causality",
    "ExpertLoad",
    "Leak",
    "Panel",
    "Report",
    "check_causality",
    "effective_rank",
    "expert_load",
    "margin",
    "output_similarity",
    "overlap",
    "participation_ratio",
    "redundancy",
    "report",
    "representation_collapse",
    "switched",
    "weight_cosine",
    "without_first",
    "write_report",
]  # fmt: skip
