"""The format of `config.json`: the config of the dense model as transformers writes it, and how to make it sparse.

The keys of moeify are at the same level as those of the dense model, so that other tools find `hidden_size` and the
like. The config of a model that transformers cannot build has the keys of moeify only.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moeify.parallel.whole import class_of
from moeify.store.modelling_file import auto_map
from moeify.store.standalone import Sparse
from moeify.store.standalone_layers import standalone_layers
from moeify.store.vllm import FIELDS, vllm_fields

MODEL_TYPE = "moeify"
_OF_MOEIFY = ("moeify", "recipe", "model", "ties", "buffers", "sites", "quantization", "sparse_layers")
_OF_TRANSFORMERS = ("model_type", "architectures", "auto_map")


def architecture_of(model: nn.Module) -> Any:
    """The dense class of transformers of a dense or sparse model; None if the model is not of transformers."""
    import transformers

    made = class_of(model)
    candidates = made.__mro__ if isinstance(model, Sparse) else (made,)
    own = [each for each in candidates if each.__module__.startswith("transformers.")]
    return next((each for each in own if getattr(transformers, each.__name__, None) is each), None)


def is_own_class(made: type) -> bool:
    """Whether a class is one of `moeify.models`, which are built by their settings."""
    return made.__module__.startswith("moeify.models.")


def identify(architecture: Any) -> dict[str, str]:
    """The entries of a config that identify a class of transformers."""
    return {"class": f"transformers.{architecture.__name__}", "model_type": architecture.config_class.model_type}


def describe(model: nn.Module) -> dict[str, Any]:
    """The class of a model's dense model, and its config if it has one."""
    config: Any = getattr(model, "config", None)
    made = class_of(model)
    if config is None:
        described: dict[str, Any] = {"class": f"{made.__module__}.{made.__qualname__}"}
        return described | ({"settings": model.settings} if is_own_class(made) else {})
    added = _OF_MOEIFY + _OF_TRANSFORMERS if isinstance(model, Sparse) else ()
    values = {key: value for key, value in config.to_dict().items() if key not in (*added, "_name_or_path")}
    architecture = architecture_of(model)
    if architecture is None:
        return {"class": f"transformers.{made.__name__}", "config": values}
    return {**identify(architecture), "config": values}


def fold(model: nn.Module, description: dict[str, Any]) -> dict[str, Any]:
    """The config that `save` writes: one that transformers can load, if it has a class for the model."""
    architecture = architecture_of(model)
    if architecture is None or "sites" not in description or "quantization" in description:
        return description
    has_own = hasattr(architecture.config_class, "num_experts_per_tok")  # of experts, as that of DeepSeek-V3
    added = _OF_TRANSFORMERS if has_own else (*_OF_TRANSFORMERS, *FIELDS)
    dense = {key: value for key, value in description["model"]["config"].items() if key not in added}
    for_vllm = {} if has_own else vllm_fields(model)
    for_transformers = {
        "model_type": MODEL_TYPE,
        "architectures": [f"Sparse{architecture.__name__}"],
        "auto_map": auto_map(architecture),
    }
    of_moeify = description | {"model": identify(architecture)}
    dtype = str(getattr(model, "dtype", "float32")).removeprefix("torch.")
    sparse = of_moeify | {"sparse_layers": standalone_layers(model)}
    return for_transformers | sparse | dense | for_vllm | {"dtype": dtype}


def unfold(description: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `fold`: moves the config of the dense model under `model`; other descriptions are unchanged."""
    model = description.get("model")
    if description.get("model_type") != MODEL_TYPE or not isinstance(model, dict):
        return description
    dense = {key: value for key, value in description.items() if key not in _OF_MOEIFY + _OF_TRANSFORMERS}
    own = {key: value for key, value in description.items() if key in _OF_MOEIFY}
    return own | {"model": model | {"config": dense | {"model_type": model.get("model_type")}}}
