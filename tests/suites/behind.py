"""A pytest plugin: models of transformers compute their experts by moeify wherever a test asks for nothing else."""

from transformers import PreTrainedModel

import moeify  # noqa: F401  (registers the implementation)

_chosen = PreTrainedModel.get_correct_experts_implementation


def _moeify_by_default(model: PreTrainedModel, requested: str | None) -> str:
    return _chosen(model, "moeify" if requested is None and model._can_set_experts_implementation() else requested)


PreTrainedModel.get_correct_experts_implementation = _moeify_by_default
