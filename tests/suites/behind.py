"""A pytest plugin: models of transformers compute their experts by moeify wherever a test asks for nothing else."""

from typing import Any

from torch.compiler import is_compiling
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moeify  # noqa: F401  (registers the implementation)

_chosen = PreTrainedModel.get_correct_experts_implementation
_compute = ALL_EXPERTS_FUNCTIONS["moeify"]
_calls = 0


def _counted(*args: Any, **kwargs: Any) -> Any:
    global _calls
    if not is_compiling():  # a graph that reads the number is compiled again for each
        _calls += 1
    return _compute(*args, **kwargs)


def _moeify_by_default(model: PreTrainedModel, requested: str | None) -> str:
    return _chosen(model, "moeify" if requested is None and model._can_set_experts_implementation() else requested)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how often moeify was behind."""
    terminalreporter.write_line(f"moeify computed {_calls:,} calls of experts")


ALL_EXPERTS_FUNCTIONS["moeify"] = _counted
PreTrainedModel.get_correct_experts_implementation = _moeify_by_default
