"""One view of the sparse layers of a model, whether they are `MoE` modules or MoE blocks of transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeify.context import Context, recomputing
from moeify.experts.base import Experts
from moeify.given import model_given
from moeify.hf.blocks import Block, unwrapped
from moeify.hf.decisions import Chosen, routing_of
from moeify.hf.discovery import find_blocks
from moeify.hf.names import EXPERTS_PER_TOKEN, SELECTION_BIASES
from moeify.moe import MoE
from moeify.routers.base import Router
from moeify.routing import Routing
from moeify.stacks import stack_of, watch

Observer = Callable[[Routing], None]


@dataclass(frozen=True, kw_only=True)
class SparseLayer(ABC):
    """A router and the experts that it chooses from, somewhere in a model.

    Attributes:
        name: of the module that holds router and experts.
        module: this module.
        router: the module that decides; None if a block of transformers has no such module.
        experts: the module with the parameters of all experts.
        shared: the module that every token passes beside the experts, such as a shared expert; None if there is none.
        num_experts: E.
        context: what the model was called with.
    """

    name: str
    module: nn.Module
    router: nn.Module | None
    experts: nn.Module
    shared: nn.Module | None
    num_experts: int
    context: Context

    @property
    def weights(self) -> dict[str, Tensor]:
        """The experts' weights that are stacked as (E, ., .), by name; empty where experts are modules."""
        return {name: p for name, p in unwrapped(self.experts).named_parameters() if p.dim() >= 3}

    @abstractmethod
    def rows_per_token(self, tokens: int | None = None) -> float | None:
        """Rows that the experts compute per token: k where it is fixed, None for E.

        Args:
            tokens: N, the length of a sequence or image, if it is known.

        Raises:
            ValueError: a block of transformers whose k is unknown.
        """

    @abstractmethod
    def common_modules(self) -> list[nn.Module]:
        """Modules inside the experts that every row passes, whichever expert it is sent to."""

    def per_token_modules(self) -> list[nn.Module]:
        """Modules inside the experts that every token passes once; none in blocks of transformers."""
        return []

    @abstractmethod
    def selection_biases(self) -> Iterator[tuple[nn.Module, str]]:
        """Owner and name of every selection bias: it changes which experts are chosen, never their weights."""

    @abstractmethod
    def observe(self, observer: Observer, *, repeated: bool = False) -> list[RemovableHandle]:
        """Call `observer` with every decision until the handles are removed; `watch_inputs` must be on as well.

        Args:
            observer: what is called.
            repeated: also for the forward passes that activation checkpointing repeats.
        """

    @abstractmethod
    def run_unrouted(self) -> list[RemovableHandle]:
        """After every pass run each expert on the tokens that were not routed to it, and drop the outputs.

        Raises:
            ValueError: a block of transformers whose experts cannot be called so.
        """


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """All sparse layers of a model by name: `MoE` modules, then MoE blocks of transformers."""
    contexts: defaultdict[str, Context] = defaultdict(Context)
    layers: dict[str, SparseLayer] = {name: MoELayer.of(name, moe) for name, moe in moe_layers(model).items()}
    return layers | {block.name: HfLayer.of(block, contexts[stack_of(block.name)]) for block in find_blocks(model)}


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The `MoE` modules of a model by name."""
    return {name: module for name, module in model_given(model).named_modules() if isinstance(module, MoE)}


def watch_inputs(model: nn.Module, layers: Mapping[str, SparseLayer]) -> list[RemovableHandle]:
    """Pass the padding mask to layers that have no context of their own: the blocks of transformers."""
    contexts = {stack_of(name): layer.context for name, layer in layers.items() if isinstance(layer, HfLayer)}
    return watch(model, list(layers), contexts)


@dataclass(frozen=True, kw_only=True)
class MoELayer(SparseLayer):
    """A `MoE` module."""

    module: MoE
    router: Router

    @classmethod
    def of(cls, name: str, moe: MoE) -> MoELayer:
        """The view of a `MoE`."""
        experts: Any = unwrapped(moe.experts)
        return cls(
            name=name, module=moe, router=moe.router, experts=moe.experts, shared=moe.shared,
            num_experts=experts.num_experts, context=moe.context,
        )  # fmt: skip

    def rows_per_token(self, tokens: int | None = None) -> float | None:
        """The value of the router."""
        return self.router.rows_per_token(tokens)

    def common_modules(self) -> list[nn.Module]:
        """The `common_modules` of the experts."""
        return [m for part in self.experts.modules() if isinstance(part, Experts) for m in part.common_modules()]

    def per_token_modules(self) -> list[nn.Module]:
        """The `per_token_modules` of the experts."""
        return [m for part in self.experts.modules() if isinstance(part, Experts) for m in part.per_token_modules()]

    def selection_biases(self) -> Iterator[tuple[nn.Module, str]]:
        """The selection biases of the router and of routers inside it."""
        for router in self.router.modules():
            if router._buffers.get("selection_bias") is not None:
                yield router, "selection_bias"

    def observe(self, observer: Observer, *, repeated: bool = False) -> list[RemovableHandle]:
        """Observe the router's output."""

        def hook(module: nn.Module, args: tuple, routing: Routing) -> None:
            if repeated or not recomputing():
                with _apart():
                    observer(routing)

        return [self.router.register_forward_hook(hook)]

    def run_unrouted(self) -> list[RemovableHandle]:
        """Call the experts once more; a `Mixture` leaves no token unread."""
        latest: list[Routing] = []

        @torch.no_grad()
        def hook(layer: MoE, args: tuple, output: Tensor) -> None:
            routing = latest.pop()
            if recomputing():
                return
            tokens = args[0].reshape(-1, args[0].shape[-1])
            unread = ~routing.reads()
            if (positions := self.context.real(len(tokens))) is not None:
                real = torch.zeros_like(unread)
                real[positions] = True
                unread &= real
            expert, token = unread.T.nonzero(as_tuple=True)
            if len(token):
                layer.experts(tokens[token], expert.bincount(minlength=self.num_experts))

        def keep(router: nn.Module, args: tuple, routing: Routing) -> None:
            latest[:] = [routing]

        return [self.router.register_forward_hook(keep), self.module.register_forward_hook(hook)]


@dataclass(frozen=True, kw_only=True)
class HfLayer(SparseLayer):
    """An MoE block of transformers.

    Attributes:
        block: how its parts are found and its decisions read.
    """

    block: Block

    @classmethod
    def of(cls, block: Block, context: Context) -> HfLayer:
        """The view of a block."""
        return cls(
            name=block.name, module=block.module, router=block.router, experts=block.experts, shared=block.shared,
            num_experts=block.num_experts, context=context, block=block,
        )  # fmt: skip

    def rows_per_token(self, tokens: int | None = None) -> float:
        """K."""
        if (k := self.block.experts_per_token) is None:
            raise ValueError(
                f"cannot tell how many experts a token uses in {self.name or type(self.module).__name__}: neither its "
                f"router nor its configuration has one of {', '.join(EXPERTS_PER_TOKEN)}; set `top_k` on "
                f"{type(unwrapped(self.experts)).__name__}"
            )
        return k

    def common_modules(self) -> list[nn.Module]:
        """No modules."""
        return []

    def selection_biases(self) -> Iterator[tuple[nn.Module, str]]:
        """The tensors outside the experts with a name that transformers uses for selection biases."""
        inside = set(self.experts.modules())
        for owner in self.module.modules():
            if owner not in inside:
                for key in SELECTION_BIASES:
                    if key in owner._buffers or key in owner._parameters:
                        yield owner, key

    def observe(self, observer: Observer, *, repeated: bool = False) -> list[RemovableHandle]:
        """Observe the block's choices."""

        def translate(chosen: Chosen) -> None:
            with _apart():
                observer(routing_of(chosen, self.num_experts, self.context))

        return self.block.observe(translate, repeated=repeated)

    def run_unrouted(self) -> list[RemovableHandle]:
        """Run them as `Block.run_unrouted` does."""
        return self.block.run_unrouted(self.context.real)


def _apart() -> AbstractContextManager[None]:
    """Compute beside a layer that activation checkpointing repeats: observers are not called again."""
    return torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept)
