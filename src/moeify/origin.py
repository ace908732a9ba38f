"""The origin of a sparse model, kept with it: the recipe and the adapters that it was made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

_ATTRIBUTE = "moeify_origin"


@dataclass(frozen=True)
class Origin:
    """What a model was made of; a dense model, and one of unknown origin, has the empty origin.

    Copies of a model have its origin.

    Attributes:
        recipe: the `Recipe` that `sparsify` followed, None if no recipe makes the model as it is.
        sites: the dense network that was found at each sparse layer, as plain values (`moeify.find.describe`), None if
            unknown.
        adapters: how adapters were put beside its linear layers (an `AdapterLibrary`), None if none were.
    """

    recipe: Any = None
    sites: list[dict[str, Any]] | None = None
    adapters: Any = None

    @classmethod
    def of(cls, model: nn.Module) -> Origin:
        """The origin of a model."""
        return getattr(model, _ATTRIBUTE, cls())  # wrappers such as those of PEFT pass it on

    def write_to(self, model: nn.Module) -> None:
        """Set this as the origin of a model."""
        vars(model)[_ATTRIBUTE] = self
