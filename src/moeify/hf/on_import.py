"""Register moeify with a module of transformers when that module is imported, and not before."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def on_import(name: str, register: Callable[[Any], None]) -> None:
    """Call a function with a module: now if it is imported, else once it is."""
    if (module := sys.modules.get(name)) is not None:
        register(module)
        return
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)
    if finder is None:
        sys.meta_path.insert(0, finder := _Finder())
    finder.waiting[name] = register


class _Finder(MetaPathFinder):
    """Finds modules as Python does, and calls a function with those that were registered by name."""

    def __init__(self) -> None:
        self.waiting: dict[str, Callable[[Any], None]] = {}

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        register = self.waiting.pop(fullname, None)
        if register is None:
            return None
        if not self.waiting:
            sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, register)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Any, register: Callable[[Any], None]) -> None:
        self._loader, self._register = loader, register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._register(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
