"""Diagnose a sparse model: recorded routing, expert load, collapse, look-ahead, pictures, and an HTML report."""

from moeify.inspect.capture import capture
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
from moeify.inspect.diagnose import Diagnosis, diagnose, diagnose_log
from moeify.inspect.faults import FAULTS, Finding
from moeify.inspect.formats import read_trace, register_format, write_trace
from moeify.inspect.join import concatenate
from moeify.inspect.load import ExpertLoad, expert_load
from moeify.inspect.logged import TrainingLog, read_log
from moeify.inspect.page import write_report
from moeify.inspect.panels.panel import Panel
from moeify.inspect.report import Report, report
from moeify.inspect.streamed import stream
from moeify.inspect.trace import LayerTrace, Tokens, Trace

__all__ = [
    "FAULTS",
    "Causality",
    "Diagnosis",
    "ExpertLoad",
    "Finding",
    "LayerTrace",
    "Leak",
    "Panel",
    "Report",
    "Tokens",
    "Trace",
    "TrainingLog",
    "capture",
    "check_causality",
    "concatenate",
    "diagnose",
    "diagnose_log",
    "effective_rank",
    "expert_load",
    "margin",
    "output_similarity",
    "overlap",
    "participation_ratio",
    "read_log",
    "read_trace",
    "redundancy",
    "register_format",
    "report",
    "representation_collapse",
    "stream",
    "switched",
    "weight_cosine",
    "without_first",
    "write_report",
    "write_trace",
]  # fmt: skip
