"""`stream`: a model larger than memory, whose weights stay on disk and are read layer by layer, expert by expert.

    model = stream("path/of/a/checkpoint")
    trace = capture(model, batches)

A forward pass holds in memory the modules outside of the layers, one layer without its experts, and one expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from moeify.files import read_json
from moeify.hf.blocks import InterfaceBlock
from moeify.layers import HfLayer, sparse_layers
from moeify.meta import move_parameters, parameters_on_meta
from moeify.progress import Progress
from moeify.store.build import build
from moeify.store.converted import Converted
from moeify.store.reading import read_headers
from moeify.store.saved import open_saved


def stream(folder: str | Path, *, dtype: torch.dtype | None = None, architecture: str | None = None) -> nn.Module:
    """A model whose layers are read from the files of a checkpoint in every forward pass, and freed after it.

    Its decisions and outputs are those of the model in memory with `experts_implementation="eager"`; a causal model
    gives the logits of the last position alone. Every forward pass reads the weights once, so give it large batches.
    Experts that no token was sent to are not read. It cannot be trained.

    Args:
        folder: what `save_pretrained` or `moeify.save` wrote, or a name on the hub.
        dtype: of the weights of a model of transformers; None for that of its config.
        architecture: the class of transformers; None for that of its config.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: a class that transformers does not have, quantised or damaged weights, or those of another model.
    """
    folder = _local(folder)
    if "moeify" in read_json(folder / "config.json"):
        with open_saved(folder) as saved:
            model = build(saved)
        source = Converted(model, saved.weights, saved.description.get("ties", {}))
    else:
        model = _on_meta(folder, dtype, architecture)
        source = Converted(model, read_headers(folder))
    model.requires_grad_(False)
    _Streamed(model.eval(), source)
    return model


def _local(folder: str | Path) -> Path:
    if Path(folder).is_dir():
        return Path(folder)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(folder), allow_patterns=["*.json", "*.safetensors"]))


def _on_meta(folder: Path, dtype: torch.dtype | None, architecture: str | None) -> nn.Module:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} is quantised; only weights in floating point can be streamed")
    name = architecture or next(iter(config.architectures or []), "")
    kind: Any = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"transformers has no model class {name!r}, which {folder} asks for; name an architecture")
    with parameters_on_meta():
        model = kind._from_config(config, dtype=dtype or config.dtype or torch.float32)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    move_parameters(model, "meta")
    return model


class _Streamed:
    """Reads the weights of each part of a model before it runs."""

    def __init__(self, model: nn.Module, source: Converted) -> None:
        self.model, self.source = model, source
        self.places = _places(model)
        self.progress: Progress | None = None
        units = [(unit, self._names(unit)) for unit in _units(model)]
        lazy = self._stack_experts()
        inside = {name for _, names in units for name in names}
        self.fill(name for name in source.own if name not in inside and not source.is_again(name))
        for number, (unit, names) in enumerate(units, 1):
            _Unit(self, unit, [name for name in names if name not in lazy], number / len(units))
        model.register_forward_pre_hook(self._begin)
        if (head := _head(model)) is not None:
            head.register_forward_pre_hook(lambda module, args: (args[0][..., -1:, :], *args[1:]))

    def _names(self, unit: nn.Module) -> list[str]:
        """The tensors that no module outside of a unit has."""
        here = set(unit.modules())
        return [name for name in self.source.own if all(owner in here for owner, _ in self.places[name])]

    def _stack_experts(self) -> set[str]:
        """Put stacks on disk in the place of stacked experts that are read one by one; their names."""
        found = set()
        for layer in sparse_layers(self.model).values():
            if not isinstance(layer, HfLayer) or type(layer.block) is not InterfaceBlock:
                continue
            names = {id(tensor): name for name, tensor in self.source.own.items()}
            for attribute, tensor in layer.experts._parameters.items():
                name = names.get(id(tensor))
                if tensor is not None and tensor.dim() == 3 and name and self.source.has_single(name):
                    layer.experts.__dict__[attribute] = Stack(self.source, name)
                    found.add(name)
        return found

    def _begin(self, model: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a streamed model cannot be trained: its weights are freed after a forward pass; call it under no_grad"
            )
        self.progress = Progress("weights read", 1.0)

    def fill(self, names: Iterable[str]) -> None:
        """Read tensors."""
        with self.source.open():
            for name in names:
                self.put(name, self.source.read(name))

    def put(self, name: str, tensor: Tensor) -> None:
        """Give a tensor, or its place on the meta device, to all modules that have it."""
        for module, key in self.places[name]:
            if key in module._parameters:
                module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[key] = tensor


class _Unit:
    """A layer whose weights are in memory while it runs."""

    def __init__(self, streamed: _Streamed, module: nn.Module, names: list[str], share: float) -> None:
        self.streamed, self.names, self.share = streamed, names, share
        self.reading = ExitStack()
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.reading.enter_context(self.streamed.source.open())
        self.streamed.fill(self.names)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        for name in self.names:
            self.streamed.put(name, self.streamed.source.own[name])
        self.reading.close()
        if self.streamed.progress is not None and self.share < 1:
            self.streamed.progress.at(self.share)


class Stack:
    """Experts (E, ., .) on disk: `stack[expert]` reads one of them, every other use all of them.

    Args:
        source: the checkpoint.
        name: of the tensor.
    """

    def __init__(self, source: Converted, name: str) -> None:
        self.source, self.name = source, name

    def __getitem__(self, which: Any) -> Tensor:
        single = isinstance(which, int) or (isinstance(which, Tensor) and which.dim() == 0)
        return self.source.read_expert(self.name, int(which)) if single else self.all()[which]

    def all(self) -> Tensor:
        """Every expert."""
        return self.source.read(self.name)

    def __getattr__(self, name: str) -> Any:
        described = {"dtype", "shape", "dim", "size", "ndim"}
        return getattr(self.source.own[self.name] if name in described else self.all(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        args, kwargs = tree_map_only(Stack, Stack.all, (args, kwargs or {}))
        return func(*args, **kwargs)


def _units(model: nn.Module) -> Iterable[nn.Module]:
    """The modules that are read as one unit: the layers of every outermost list, and the output embedding."""
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            yield from module
        else:
            yield from _units(module)
    if (head := _head(model)) is not None:
        yield head


def _head(model: Any) -> nn.Module | None:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """The modules that have each parameter and buffer, which may be tied."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for name, tensor in named:
        owner, _, key = name.rpartition(".")
        owners.setdefault(id(tensor), []).append((model.get_submodule(owner), key))
    return {name: owners[id(tensor)] for name, tensor in named}
