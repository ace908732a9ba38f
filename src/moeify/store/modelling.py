"""Sparse models as classes of transformers, which `AutoModel...from_pretrained` and tools built on it can load.

A sparse class inherits from `SparseModel` and a class of transformers: `SparseLlamaForCausalLM` is a `LlamaForCausalLM`
whose dense FFNs are replaced according to `config.recipe` and `config.sites`. It is created when its config is read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeify.files import HASHES, share_tensors
from moeify.moe import MoE
from moeify.origin import Origin
from moeify.sparsify.plan import Plan, find
from moeify.sparsify.recipe import Recipe
from moeify.store.build import apply_on_meta
from moeify.store.config import MODEL_TYPE, architecture_of, identify
from moeify.store.modelling_file import auto_classes, auto_map, write_modelling_file
from moeify.store.standalone import Sparse, announce, name_in


class SparseModel(Sparse):
    """Mixin that replaces dense FFNs by the layers of a recipe when a model of its other base class is built.

    Routers are in fp32 for every `dtype` that a model is loaded in.
    """

    def make_sparse(self, config: Any) -> None:
        """Replace the dense FFNs listed in `config.sites` by the layers of `config.recipe`."""
        model: Any = self
        recipe, sites = Recipe.from_dict(config.recipe), _renamed(model, config.sites)
        if any(isinstance(part, MoE) for part in model.modules()):  # built sparse, by `AutoModel`
            Origin(recipe, sites).write_to(model)
        else:
            with _on_cpu_in_fp32():  # compute buffers even if parameters are on the meta device
                _apply(find(model, recipe, sites))
        model._computed = dict(_computed_buffers(model))

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise tensors that are not in the files; computed buffers of sparse layers are restored."""
        super()._init_weights(module)  # pyrefly: ignore[missing-attribute]
        for name, value in getattr(self, "_computed", {}).get(module, {}).items():
            setattr(module, name, value.to(module.get_buffer(name).device))

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as in `PreTrainedModel`, and write the modelling file; hashes of an earlier `save` are deleted."""
        model: Any = self
        architecture = architecture_of(model)
        model.config.model = identify(architecture)
        model.config.auto_map = auto_map(architecture)
        model.config.sites, model.config.ties = Origin.of(model).sites, dict(model.all_tied_weights_keys)
        (Path(save_directory) / HASHES).unlink(missing_ok=True)
        super().save_pretrained(save_directory, *args, **kwargs)  # pyrefly: ignore[missing-attribute]
        share_tensors(save_directory)
        write_modelling_file(save_directory, architecture, is_plain=model.config.sparse_layers is not None)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: `save_pretrained` generates the modelling file instead of copying it."""


def _apply(plan: Plan) -> None:
    if next(plan.model.parameters()).is_meta:
        apply_on_meta(plan)
    else:
        plan.apply(allow_noncausal=True)


def _renamed(model: nn.Module, sites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sites with the module names of this model, which may be the saved one without its head."""
    renamed = copy.deepcopy(sites)
    for site in renamed:
        site |= {key: name_in(model, site[key]) for key in ("name", "down") if key in site}
        site |= {key: [name_in(model, name) for name in site[key]] for key in ("up", "parts") if key in site}
        for held in (site["activation"],) if "module" in site.get("activation", {}) else ():
            held["module"] = name_in(model, held["module"])
        for change in site.get("disabled", ()):
            change[0] = name_in(model, change[0])
    return renamed


@contextmanager
def _on_cpu_in_fp32() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _computed_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Tensor]]]:
    """The non-persistent buffers of sparse layers by module, whose values `from_pretrained` discards."""
    for layer in [part for part in model.modules() if isinstance(part, MoE)]:
        for module in layer.modules():
            buffers = {name: module._buffers.get(name) for name in module._non_persistent_buffers_set}
            if values := {name: buffer for name, buffer in buffers.items() if buffer is not None}:
                yield module, values


@cache
def sparse_config_class(dense: type) -> type:
    """The sparse config class for a dense one, registered with every `AutoModel...` that supports `dense`.

    An instance has an attribute for every key that `save` adds to a config.
    """
    from transformers.models.auto import modeling_auto

    attributes = {"model_type": MODEL_TYPE, "register_for_auto_class": SparseModel.register_for_auto_class}
    made = type(f"Sparse{dense.__name__}", (dense,), attributes | {"__module__": __name__})
    for auto, architecture in auto_classes(dense).items():
        if isinstance(architecture, type):
            getattr(modeling_auto, auto).register(made, sparse_class(architecture, made), exist_ok=True)
    return made


@cache
def sparse_class(architecture: type, config_class: type) -> type:
    """The sparse class for a class of transformers, also set as an attribute of `transformers` for look-up by name."""
    attributes = {"config_class": config_class, "__module__": __name__}
    made = type(f"Sparse{architecture.__name__}", (SparseModel, architecture), attributes)
    announce(made)
    return made


def register(module: Any) -> None:
    """Register the configs of sparse models with `AutoConfig`, which then returns the sparse config class of the model.

    Args:
        module: `transformers.models.auto.configuration_auto`.
    """
    from transformers import PreTrainedConfig

    class MoeifyConfig(PreTrainedConfig):
        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            import transformers

            name = config_dict["model"]["class"].removeprefix("transformers.")
            return sparse_config_class(getattr(transformers, name).config_class).from_dict(config_dict, **kwargs)

    module.AutoConfig.register(MODEL_TYPE, MoeifyConfig)
