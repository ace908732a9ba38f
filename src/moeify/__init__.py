"""Make any transformer sparse: tokens -> router -> dispatch -> experts -> combine.

The public names are imported when they are first used, so that the command line can show its help without torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from moeify.hf.on_import import on_import
from moeify.version import __version__ as __version__

if TYPE_CHECKING:
    from moeify.capacity import limit
    from moeify.compose import from_adapters, load_adapters, merge_models, save_adapters
    from moeify.context import Context
    from moeify.moe import MoE
    from moeify.record import record
    from moeify.registry import register
    from moeify.routing import Assignment, Evidence, Mixture, Routing, assign
    from moeify.sparsify import Recipe, sparsify
    from moeify.store import load, save

__all__ = [
    "Assignment",
    "Context",
    "Evidence",
    "Mixture",
    "MoE",
    "Recipe",
    "Routing",
    "assign",
    "from_adapters",
    "limit",
    "load",
    "load_adapters",
    "merge_models",
    "record",
    "register",
    "save",
    "save_adapters",
    "sparsify",
]  # fmt: skip

_HOMES = {
    "capacity": ("limit",),
    "compose": ("from_adapters", "load_adapters", "merge_models", "save_adapters"),
    "context": ("Context",),
    "moe": ("MoE",),
    "record": ("record",),
    "registry": ("register",),
    "routing": ("Assignment", "Evidence", "Mixture", "Routing", "assign"),
    "sparsify": ("Recipe", "sparsify"),
    "store": ("load", "save"),
}
_HOME = {name: f"moeify.{module}" for module, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """The package, whose `record` and `sparsify` are functions also once the modules of these names are imported."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            if name.startswith("_") or find_spec(f"moeify.{name}") is None:
                raise AttributeError(f"module 'moeify' has no attribute {name!r}")
            return import_module(f"moeify.{name}")
        value = getattr(import_module(_HOME[name]), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package


def _register_experts(module: Any) -> None:
    from moeify.hf.interface import moeify_experts

    module.ALL_EXPERTS_FUNCTIONS.register("moeify", moeify_experts)


def _register_expert_parallelism(module: Any) -> None:
    from torch import distributed

    if not distributed.is_available():
        return
    from moeify.hf.expert_parallel import RowsToExperts

    module.EPImplementationInterface.register("moeify", RowsToExperts)


def _register_models(module: Any) -> None:
    from moeify.store.modelling import register

    register(module)


on_import("transformers.integrations.moe", _register_experts)
on_import("transformers.distributed.expert_parallel", _register_expert_parallelism)
on_import("transformers.models.auto.configuration_auto", _register_models)
