"""A mixture-of-experts block of transformers, and how to observe what it chooses.

Most families call a module of stacked experts with tokens, expert indices and weights: `InterfaceBlock`. Those that do
otherwise are in `moeify.hf.families`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeify.context import recomputing
from moeify.hf.decisions import Chosen, choices, is_observed, unobserved
from moeify.hf.names import EXPERTS_PER_TOKEN, number
from moeify.moe import MoE

Observer = Callable[[Chosen], None]
Hook = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Block(ABC):
    """A mixture-of-experts block of transformers.

    Attributes:
        name: of the module that holds router and experts.
        module: this module.
        router: the module that computes the logits, if there is one, PEFT wrappers included.
        experts: the module that holds all experts, PEFT wrappers included.
        shared: the module that every token passes beside the experts.
        num_experts: E, zero experts included.
    """

    name: str
    module: nn.Module
    router: nn.Module | None
    experts: nn.Module
    shared: nn.Module | None
    num_experts: int

    @property
    def experts_per_token(self) -> int | None:
        """K, read from the router, the block or a configuration."""
        experts = unwrapped(self.experts)
        router = None if self.router is None else unwrapped(self.router)
        owners = (router, self.module, experts, getattr(experts, "config", None))
        k = next((k for owner in owners if (k := number(owner, EXPERTS_PER_TOKEN)) is not None), None)
        return None if k is None else int(k)

    @property
    def remark(self) -> str:
        """What one must know to understand the decisions of the block; empty if nothing."""
        return ""

    @abstractmethod
    def observe(self, observer: Observer, *, repeated: bool = False) -> list[RemovableHandle]:
        """Call `observer` with the choices of the block in every pass; in repeated ones only if `repeated`."""

    def run_unrouted(self, real: Callable[[int], Int[Tensor, "T"] | None]) -> list[RemovableHandle]:
        """After every pass run each expert on the tokens that were not routed to it, and drop the outputs.

        Args:
            real: from a number of tokens to the positions of the real ones, None for all.

        Raises:
            ValueError: the experts of the block cannot be called in this way.
        """
        raise ValueError(
            f"{self.name or type(self.module).__name__} does not call its experts with chosen tokens, so they cannot "
            f"be shown the others; call every expert of {type(self.module).__name__} yourself"
        )


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is an adapter of PEFT around another module."""
    return isinstance(getattr(module, "base_layer", None), nn.Module) and not isinstance(module, MoE)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside its PEFT wrappers, or the module itself if it has none."""
    while is_wrapper(module):
        module = module.get_submodule("base_layer")
    return module


@dataclass(frozen=True, kw_only=True)
class InterfaceBlock(Block):
    """A block whose experts are called with tokens, indices and weights, as the experts interface has it.

    Experts are recognised by what they hold, stacked weights `down_proj (E, ., .)`, and by what they are called with;
    the router is the sibling with a weight or a linear map of E rows, and returns its logits first.
    """

    def observe(self, observer: Observer, *, repeated: bool = False) -> list[RemovableHandle]:
        """Observe the arguments of the experts, and the router's first output."""
        latest: dict[str, Tensor] = {}
        return [*self._watch_router(latest, repeated), self._watch_experts(latest, observer, repeated)]

    def _watch_router(self, latest: dict[str, Tensor], repeated: bool) -> Iterator[RemovableHandle]:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if repeated or not recomputing():
                latest["output"] = self._logits(output)

        if self.router is not None:
            yield self.router.register_forward_hook(hook)

    def _logits(self, output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def _watch_experts(self, latest: dict[str, Tensor], observer: Observer, repeated: bool) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if (repeated or not recomputing()) and is_observed():
                observer(self._chosen((*args, *kwargs.values()), latest.pop("output", None)))

        return self.experts.register_forward_pre_hook(hook, with_kwargs=True)

    def _chosen(self, arguments: tuple, router_output: Tensor | None) -> Chosen:
        index, weights = choices(arguments)
        return Chosen(index=index, weights=weights, router_output=router_output)

    def run_unrouted(self, real: Callable[[int], Int[Tensor, "T"] | None]) -> list[RemovableHandle]:
        """Call the experts once more, with all other choices and weights of 0."""
        calling = False

        @torch.no_grad()
        def hook(experts: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
            nonlocal calling
            if recomputing() or calling:
                return
            index, weights = choices((*args, *kwargs.values()))
            positions = real(len(index))
            positions = torch.arange(len(index), device=index.device) if positions is None else positions
            not_chosen = torch.ones(len(index), self.num_experts, device=index.device).scatter(1, index, 0.0)
            others = not_chosen.argsort(dim=1, descending=True)[
                positions, : not_chosen.shape[1] - index.shape[1]
            ]  # (T, E - K)

            def unrouted(value: Any) -> Any:
                if value is index:
                    return others
                if value is weights:
                    return torch.zeros_like(others, dtype=weights.dtype)
                return value[positions] if isinstance(value, Tensor) else value

            calling = True
            try:
                with unobserved():
                    experts(*map(unrouted, args), **{name: unrouted(value) for name, value in kwargs.items()})
            finally:
                calling = False

        return [self.experts.register_forward_hook(hook, with_kwargs=True)]
