"""Read the tensors of models to merge, from memory or from files one tensor at a time, and compare the models."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeify.files import open_tensors
from moeify.find.probe import find_probe
from moeify.given import named
from moeify.sparsify.comparison import Comparison
from moeify.store.reading import weight_files

Names = tuple[str, ...]
"""Every name of one tensor of a model; tied ones have several."""


class Source(ABC):
    """A model whose tensors are read one at a time.

    Attributes:
        name: its name in messages.
        shapes: the shape of each of its tensors, by the names of the model that is made.
        settings: its modules and configuration.
        architecture: the name of its class, "" if it is not known.
    """

    name: str
    architecture: str
    shapes: dict[str, tuple[int, ...]]
    settings: dict[str, Any]

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """One tensor."""

    @abstractmethod
    def load(self) -> nn.Module:
        """The whole model."""

    def first(self, names: Names) -> Tensor:
        """The tensor that has one of these names."""
        return self.read(next(name for name in names if name in self.shapes))


class Loaded(Source):
    """A module in memory."""

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name = name
        self._tensors = model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.settings = settings(model)
        self.architecture, self._model = type(model).__name__, model

    def read(self, name: str) -> Tensor:
        """One tensor, as the module holds it."""
        return self._tensors[name]

    def load(self) -> nn.Module:
        """The module itself."""
        return self._model


class Checkpoint(Source):
    """Files of safetensors, of which nothing stays in memory.

    Args:
        name: its name in messages.
        path: a folder as `save_pretrained` writes it, or one file.
        model: a model of the same kind, whose names the tensors are known by; transformers may store others.

    Raises:
        FileNotFoundError: no such checkpoint, or a file of it is missing.
        ValueError: files that are damaged.
    """

    def __init__(self, name: str, path: str | Path, model: nn.Module) -> None:
        self.name, path = name, Path(path)
        self._where: dict[str, tuple[Path, str]] = {}
        self.shapes = {}
        config = _read_config(path) if (path / "config.json").is_file() else None
        self.settings = {} if config is None else _config(config)
        self.architecture = (getattr(config, "architectures", None) or [""])[0]
        self._path = path
        name_of = _renaming(model)
        for file in [path] if path.is_file() else weight_files(path):
            with open_tensors(file) as tensors:
                for stored in tensors.keys():  # noqa: SIM118  it is no mapping
                    own = name_of(stored)
                    self._where[own] = (file, stored)
                    self.shapes[own] = tuple(tensors.get_slice(stored).get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor, read from its file."""
        file, stored = self._where[name]
        with open_tensors(file) as tensors:
            return tensors.get_tensor(stored)

    def load(self) -> nn.Module:
        """The model of transformers in the folder."""
        return build(self._path)


def source_of(name: str, model: nn.Module | str | Path, like: nn.Module) -> Source:
    """The source for a module or a path."""
    return Loaded(name, model) if isinstance(model, nn.Module) else Checkpoint(name, _path(model), like)


def build(model: nn.Module | str | Path) -> nn.Module:
    """A model of its own to write into: a copy of a module, or the model of transformers in a folder.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: the folder does not name the class of its model.
    """
    import transformers

    if isinstance(model, nn.Module):
        return copy.deepcopy(model)
    architecture = getattr(transformers, (_read_config(_path(model)).architectures or ["?"])[0], None)
    if architecture is None:
        raise ValueError(
            f"{model} does not name the class of its model ('architectures' in config.json); load one model yourself "
            "and pass it as base=..."
        )
    return architecture.from_pretrained(model, local_files_only=True)


def tensors(model: nn.Module) -> dict[Names, Tensor]:
    """Every parameter and saved buffer of a model, once, with all its names."""
    by_name = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in by_name.items():
        names.setdefault(id(tensor), []).append(name)
    return {tuple(group): by_name[group[0]] for group in names.values()}


def refuse_unlike(source: Source, model: nn.Module) -> None:
    """Refuse a source that is not of the kind of the model.

    Raises:
        ValueError: tensors that are missing, unexpected, of another shape or not tied alike; other parts or another
            configuration. The message names them and names the remedy.
    """
    fault = next(_faults(source, model), None)
    if fault is not None:
        raise ValueError(f"model {source.name!r} is not like the others: {fault}")


def _faults(source: Source, model: nn.Module) -> Iterator[str]:
    own = tensors(model)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    for names, tensor in own.items():
        present = [name for name in names if name in source.shapes]
        if not present:
            yield (
                f"it has no tensor {names[0]}; only models of one architecture can be merged, and if a checkpoint "
                "stores it in another form, load it and pass the module"
            )
        for name in present:
            theirs, ours = source.shapes[name], tuple(tensor.shape)
            if theirs != ours:
                resized = theirs[1:] == ours[1:] and ours[0] == vocabulary
                yield f"{name} is {theirs} there and {ours} in the others; " + (
                    f"bring all vocabularies to one size with model.resize_token_embeddings({vocabulary})"
                    if resized
                    else "only models of one size can be merged"
                )
        if len(present) > 1 and not _equal(source, present):
            yield f"{' and '.join(present)} differ there and are tied in the others; tie them, or untie all models"
    ignored: Any = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    known = {name for names in own for name in names}
    for name in source.shapes:
        if name not in known and not any(re.search(pattern, name) for pattern in [*ignored, _COMPUTED]):
            yield f"it has a tensor {name} that the others have not; only models of one architecture can be merged"
    if hasattr(model, "config") and source.architecture not in ("", type(model).__name__):
        yield from _faults_of_another_class(source, model)
        return
    own_settings = settings(model)
    for key, value in source.settings.items():
        if value != own_settings.get(key, value):
            yield (
                f"{key} is {value} there and {own_settings[key]} in the others; if that does not change what it "
                "computes, set it alike before merging"
            )


def _faults_of_another_class(source: Source, model: nn.Module) -> Iterator[str]:
    """The differences between a model of another class and a model of this class with its tensors."""
    ours, theirs = (
        {key: value for key, value in each.items() if key.startswith("config.") and key != "config.model_type"}
        for each in (settings(model), source.settings)
    )
    here, there = type(model).__name__, source.architecture
    for key in ours | theirs:
        alone = key not in ours or key not in theirs
        value, own = theirs.get(key), ours.get(key)
        if value != own and (not alone or re.search("window|chunk", key)):
            yield (
                f"it is a {there} whose {key} is {value}, and {own} in the others ({here}); if that does not change "
                "what it computes on your texts, set it alike before merging"
            )
    probe, filled = find_probe(model), copy.deepcopy(model)
    with torch.no_grad():
        for names, tensor in tensors(filled).items():
            tensor.copy_(source.first(names))
    if probe is None or not Comparison.of(source.load(), probe).same(filled):
        yield (
            f"it is a {there}, and a {here} with its tensors computes something else; merge models that are all of one "
            "of both classes"
        )


_COMPUTED = r"rotary_emb\.inv_freq$"
"""Tensors that old checkpoints hold and models compute from their configuration, which is compared."""


def _equal(source: Source, names: list[str]) -> bool:
    one, *others = (source.read(name) for name in names)
    return all(torch.equal(one, other) for other in others)


def settings(model: nn.Module) -> dict[str, Any]:
    """The settings that determine a model's function beside its tensors: its modules and its configuration."""
    config = getattr(model, "config", None)
    parts = {
        f"the module {name or '(model)'}": f"{type(part).__name__}({part.extra_repr()})"
        for name, part in model.named_modules()
        if not isinstance(part, nn.Dropout)
    }
    return parts | (_config(config) if hasattr(config, "to_dict") else {})


_HARMLESS = re.compile(
    r"(^_|version$|dtype$|architectures$|use_cache|return_dict|output_|label|problem_type|task|drop|_token_id|initializer)"
)


def _config(config: Any) -> dict[str, Any]:
    def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if _HARMLESS.search(str(key)):
                continue
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"config.{prefix}{key}", value

    return dict(flat(config.to_dict()))


def _path(model: Any) -> Path:
    if isinstance(model, str | Path):
        return Path(model)
    raise TypeError(f"expected a model or the path of one, but got {named(model)}")


def _read_config(folder: Path) -> Any:
    import transformers

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; models are given as modules, or as folders on this disk")
    return transformers.AutoConfig.from_pretrained(folder, local_files_only=True)


def _renaming(model: nn.Module) -> Callable[[str], str]:
    """From the names that tensors are stored under to those that a model of transformers has for them."""
    import transformers

    if not isinstance(model, transformers.PreTrainedModel):
        return str
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    changes = [change for change in get_model_conversion_mapping(model) if isinstance(change, WeightRenaming)]
    own = model.state_dict()
    return lambda stored: rename_source_key(stored, changes, [], model.base_model_prefix, own)[0]
