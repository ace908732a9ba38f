"""`ModelSpec`: a causal language model described independently of its class: what it computes, and its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


class Unsupported(ValueError):
    """A model that a target cannot express, with the reason.

    Attributes:
        wanted: the value of the trait that the target can express; an ellipsis if no rewrite gives it.
        trait: the trait that does not fit; '' if the reason is another.
    """

    def __init__(self, reason: str, wanted: Any = ..., trait: str = "") -> None:
        super().__init__(reason)
        self.wanted, self.trait = wanted, trait


@dataclass(frozen=True)
class ModelSpec:
    """What a decoder computes: the one description that every target reads, for any class of model.

    Attributes:
        traits: sizes, attention, norms, positions, experts and router by the names of `families.DECODER` and `EXPERTS`;
            traits without effect, such as the width of dense networks where there are none, are omitted.
        tensors: by name. Those of a sparse layer i are `layers.i.router` (E, D), `selection_bias` (E), `gate_up`
            (E, 2H, D), `down` (E, D, H), `shared_gate_up` (2S, D), `shared_down` (D, S) and `shared_gate` (1, D); all
            others have the names that Llama gives them.
        rewrites: descriptions of the changes so far, none of which changes the function.
    """

    traits: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    rewrites: tuple[str, ...] = ()

    def __getitem__(self, trait: str) -> Any:
        """The value of a trait."""
        return self.traits[trait]

    def rewritten(self, what: str, tensors: Mapping[str, Tensor] | None = None, **traits: Any) -> ModelSpec:
        """The same function with other tensors and traits.

        Args:
            what: in words.
            tensors: those that are new or changed.
            traits: those that changed.
        """
        return replace(
            self, traits={**self.traits, **traits}, tensors={**self.tensors, **(tensors or {})},
            rewrites=(*self.rewrites, what),
        )  # fmt: skip

    def without(self, what: str, names: set[str], **traits: Any) -> ModelSpec:
        """The same function without tensors that contribute nothing."""
        kept = {name: tensor for name, tensor in self.tensors.items() if name not in names}
        return replace(self, traits={**self.traits, **traits}, tensors=kept, rewrites=(*self.rewrites, what))

    def each(self, part: str) -> dict[str, Tensor]:
        """A part of every sparse layer, by name."""
        names = [f"layers.{i}.{part}" for i in self["sparse_layers"]]
        return {name: self.tensors[name] for name in names if name in self.tensors}
