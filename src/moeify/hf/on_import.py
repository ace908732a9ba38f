"""Makes `experts_implementation="moeify"` known to transformers, as soon as it is imported and not before."""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_REGISTRY = "transformers.integrations.moe"


def register_moeify_experts() -> None:
    """Register with transformers' experts functions: now if they are imported, else when they are."""
    if (module := sys.modules.get(_REGISTRY)) is not None:
        _add(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _add(module: Any) -> None:
    from moeify.hf.interface import moeify_experts

    module.ALL_EXPERTS_FUNCTIONS.register("moeify", moeify_experts)


class _Finder(MetaPathFinder):
    """Lets Python find the module as ever, and adds the function once it is loaded."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _add(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
