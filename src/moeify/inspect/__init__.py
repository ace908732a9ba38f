"""Look at what a sparse model does: expert load, pictures, and a report to read in a browser."""

from moeify.inspect.load import ExpertLoad, expert_load
from moeify.inspect.page import write_report

__all__ = ["ExpertLoad", "expert_load", "write_report"]
