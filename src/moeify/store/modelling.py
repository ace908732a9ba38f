"""Sparse models as classes of transformers, which `AutoModel...from_pretrained` opens, and so do the tools around it.

A sparse class inherits from `SparseModel` and a class of transformers: `SparseLlamaForCausalLM` is a `LlamaForCausalLM`
whose dense networks are replaced as `config.recipe` and `config.sites` say. Reading such a config makes it.
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

from moeify.files import HASHES
from moeify.moe import MoE
from moeify.origin import Origin
from moeify.sparsify.plan import Plan, find
from moeify.sparsify.recipe import Recipe
from moeify.store.build import apply_on_meta
from moeify.store.config import MODEL_TYPE, architecture_of, identify
from moeify.store.modelling_file import auto_classes, auto_map, write_modelling_file
from moeify.store.standalone import Sparse, announce, name_in


class SparseModel(Sparse):
    """Puts the layers of a recipe into models of a class of transformers, its other base class, when they are built.

    Routers stay in fp32 whatever `dtype` a model is loaded in.
    """

    def make_sparse(self, config: Any) -> None:
        """Put the layers of `config.recipe` into the places of `config.sites`."""
        model: Any = self
        recipe, sites = Recipe.from_dict(config.recipe), _renamed(model, config.sites)
        if any(isinstance(part, MoE) for part in model.modules()):  # its head has built it by `AutoModel`
            Origin(recipe, sites).write_to(model)
        else:
            with _on_cpu_in_fp32():  # buffers get their values also where parameters have no memory yet
                _apply(find(model, recipe, sites))
        model._computed = dict(_computed_buffers(model))

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what no file holds; buffers that a sparse layer computes are as they were computed."""
        super()._init_weights(module)  # pyrefly: ignore[missing-attribute]
        for name, value in getattr(self, "_computed", {}).get(module, {}).items():
            setattr(module, name, value.to(module.get_buffer(name).device))

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as `PreTrainedModel` does, and write the modelling file; hashes of an earlier `save` are deleted."""
        model: Any = self
        architecture = architecture_of(model)
        model.config.model = identify(architecture)
        model.config.auto_map = auto_map(architecture)
        model.config.sites, model.config.ties = Origin.of(model).sites, dict(model.all_tied_weights_keys)
        (Path(save_directory) / HASHES).unlink(missing_ok=True)
        super().save_pretrained(save_directory, *args, **kwargs)  # pyrefly: ignore[missing-attribute]
        write_modelling_file(save_directory, architecture, is_plain=model.config.sparse_layers is not None)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: the modelling file is written anew, not copied."""


def _apply(plan: Plan) -> None:
    if next(plan.model.parameters()).is_meta:
        apply_on_meta(plan)
    else:
        plan.apply(allow_noncausal=True)


def _renamed(model: nn.Module, sites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sites by the names that their modules have in a model, which may be the saved one without its head."""
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
    """The buffers of sparse layers that no file holds, by module, for `from_pretrained` takes their values away."""
    for layer in [part for part in model.modules() if isinstance(part, MoE)]:
        for module in layer.modules():
            buffers = {name: module._buffers.get(name) for name in module._non_persistent_buffers_set}
            if values := {name: buffer for name, buffer in buffers.items() if buffer is not None}:
                yield module, values


@cache
def sparse_config_class(dense: type) -> type:
    """The config class of sparse models for that of dense ones; every `AutoModel...` that takes `dense` takes it too.

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
    """The sparse class of a class of transformers, where tools find it that look an architecture up by its name."""
    attributes = {"config_class": config_class, "__module__": __name__}
    made = type(f"Sparse{architecture.__name__}", (SparseModel, architecture), attributes)
    announce(made)
    return made


def register(module: Any) -> None:
    """Let `AutoConfig` read the configs of sparse models, with a class that turns into that of the model at hand.

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
