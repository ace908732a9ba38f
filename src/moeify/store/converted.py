"""Read single tensors of a checkpoint by their names in the model, applying the weight conversions of transformers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeify.files import open_tensors
from moeify.store.reading import Weights
from moeify.store.weights import persistent, ties_to_stored


@dataclass(frozen=True)
class Parts:
    """The stored tensors from which a tensor of a model is computed.

    Attributes:
        converter: the `WeightConverter` of transformers; None if the tensor is stored as it is.
        stored: stored names by source pattern of the converter; without a converter one name under "".
    """

    converter: Any = None
    stored: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def of(self, expert: int) -> Parts:
        """The stored tensors of one expert, if every pattern has one tensor per expert."""
        return Parts(self.converter, {pattern: [names[expert]] for pattern, names in self.stored.items()})

    def are_experts(self, num_experts: int) -> bool:
        """Whether every pattern has one tensor per expert, which the converter stacks."""
        if self.converter is None or len(self.converter.target_patterns) > 1:
            return False
        from transformers.core_model_loading import Concatenate, MergeModulelist

        stack, *others = self.converter.operations
        return (
            isinstance(stack, MergeModulelist) and stack.dim == 0
            and all(isinstance(operation, Concatenate) and operation.dim > 0 for operation in others)
            and all(len(names) == num_experts for names in self.stored.values())
        )  # fmt: skip


class Converted:
    """The tensors of a checkpoint, read one at a time by their names in a model.

    Args:
        model: the model of the checkpoint, on the meta device; tensors are read in its dtypes.
        weights: the weights of the checkpoint.
        ties: tied names, each with the name of the stored tensor; None for the ties of the model.

    Raises:
        ValueError: tensors of the model are missing in the files.
    """

    def __init__(self, model: nn.Module, weights: Weights, ties: Mapping[str, str] | None = None) -> None:
        self.model, self.weights = model, weights
        self.own = persistent(model)
        self.parts = dict(_parts(model, self.own, weights)) if ties is None else _as_stored(weights)
        given = ties_to_stored(self.own, self.parts) if ties is None else ties
        self.ties = {name: kept for name, kept in given.items() if name not in self.parts}
        self.dtypes = _dtypes(model, self.own) if ties is None else {}
        if missing := [name for name in self.own if self.ties.get(name, name) not in self.parts]:
            raise ValueError(
                f"the weights in {weights.folder} are not those of a {type(model).__name__}; missing: "
                f"{', '.join(missing[:5])}{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}"
            )
        self._files: dict[Path, Any] = {}
        self._closing: ExitStack | None = None

    @contextmanager
    def open(self) -> Generator[None]:
        """Keep files open inside, so that their headers are read once; tensors remain valid afterwards."""
        if self._closing is not None:
            yield
            return
        try:
            with ExitStack() as self._closing:
                yield
        finally:
            self._files, self._closing = {}, None

    def is_again(self, name: str) -> bool:
        """Whether a tensor is tied to another one of the model, which is stored."""
        return name in self.ties and self.own[name] is self.own[self.ties[name]]

    def read(self, name: str) -> Tensor:
        """Read a tensor of the model.

        Raises:
            ValueError: its shape differs from that in the model.
        """
        name = self.ties.get(name, name)
        return self._fitting(name, self._made(name, self.parts[name], slice(None)), self.own[name].shape)

    def has_single(self, name: str) -> bool:
        """Whether the experts of a stacked tensor (E, ., .) can be read one at a time."""
        parts = self.parts[name]
        return parts.converter is None or parts.are_experts(len(self.own[name]))

    def read_expert(self, name: str, expert: int) -> Tensor:
        """Read the matrix (., .) of one expert of a stacked tensor.

        Raises:
            ValueError: its shape differs from that in the model.
        """
        parts, as_stored = self.parts[name], self.parts[name].converter is None
        tensor = self._made(name, parts, expert) if as_stored else self._made(name, parts.of(expert), slice(None))[0]
        return self._fitting(f"an expert of {name}", tensor, self.own[name].shape[1:])

    def _fitting(self, what: str, tensor: Tensor, needed: tuple[int, ...]) -> Tensor:
        if tensor.shape != needed:
            raise ValueError(
                f"{what} is {tuple(tensor.shape)} in {self.weights.folder}, the model needs {tuple(needed)}; its "
                "config.json belongs to other weights"
            )
        return tensor

    def _made(self, name: str, parts: Parts, where: Any) -> Tensor:
        dtype = self.dtypes.get(name)
        with self.open():
            stored = {key: [self._stored(n, where, dtype) for n in names] for key, names in parts.stored.items()}
        if parts.converter is None:
            return stored[""][0]
        converter = deepcopy(parts.converter)
        for pattern, tensors in stored.items():
            converter.collected_tensors[pattern] = tensors
        first = _first_target(name, parts.converter)
        found = converter.convert(first, model=self.model, config=getattr(self.model, "config", None))
        made = found[name]
        return made[0] if isinstance(made, list) else made

    def _stored(self, name: str, where: Any, dtype: torch.dtype | None) -> Tensor:
        file = self.weights.files[name]
        if file not in self._files and self._closing is not None:
            self._files[file] = self._closing.enter_context(open_tensors(file))
        opened = self._files[file]
        tensor = opened.get_slice(name)[where] if self.weights.shapes[name] else opened.get_tensor(name)
        return tensor if dtype is None else tensor.to(dtype)


def _as_stored(weights: Weights) -> dict[str, Parts]:
    return {name: Parts(None, {"": [name]}) for name in weights.shapes}


def _parts(model: nn.Module, own: dict[str, Tensor], weights: Weights) -> Iterator[tuple[str, Parts]]:
    """Every tensor of the model with its stored parts, in the natural order of their names."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms: Any = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [change for change in transforms if isinstance(change, WeightRenaming)]
    converters = [change for change in transforms if isinstance(change, WeightConverter)]
    of_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix: Any = model.base_model_prefix
    found: dict[str, Parts] = {}
    for stored in sorted(weights.shapes, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, own)
        if name not in own and stored in own:
            name, pattern = stored, None
        if name in own:
            converter = None if pattern is None else of_pattern[pattern]
            found.setdefault(name, Parts(converter)).stored[pattern or ""].append(stored)
    for name, parts in found.items():
        for target in _targets(name, parts.converter):
            yield target, parts


def _targets(first: str, converter: Any) -> list[str]:
    if converter is None:
        return [first]
    patterns = converter.target_patterns
    return [first.replace(patterns[0], pattern) for pattern in patterns]


def _first_target(name: str, converter: Any) -> str:
    patterns = converter.target_patterns
    found = next((pattern for pattern in patterns if pattern in name), patterns[0])
    return name.replace(found, patterns[0])


def _dtypes(model: Any, own: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """The dtype of each tensor: the model's, and fp32 for `_keep_in_fp32_modules` of its class."""
    strict = model._keep_in_fp32_modules_strict or ()
    half = (model._keep_in_fp32_modules or ()) if model.dtype == torch.float16 else ()
    return {
        name: torch.float32 if any(part in name for part in (*strict, *half)) else tensor.dtype
        for name, tensor in own.items()
    }
