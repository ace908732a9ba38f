"""The sparse layer: tokens -> router -> dispatch -> experts -> combine."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify import backends, env, given
from moeify.context import Context
from moeify.experts.base import Experts
from moeify.experts.sequences import Sequences
from moeify.experts.wrapped import as_experts
from moeify.routers.base import Router
from moeify.routing import Routing


class MoE(nn.Module):
    """A sparse mixture-of-experts layer, which replaces a feed-forward network.

    Args:
        router: decides which expert reads which token.
        experts: the experts.
        shared: a module that reads every token beside the experts, such as a shared expert.
        memory: a module that also reads the context, such as an `Engram`, which looks token ids up.
        backend: how the layer is computed, see `moeify.backends`.
        context: what the model was called with; `sparsify` gives the layers of one stack the same one.
        name: the layer's name in its model, for messages.

    Raises:
        ValueError: in `forward`, a named backend that does not support the call.
        FloatingPointError: in `forward`, router logits that are not finite; checked where it costs no
            synchronisation (on the CPU), elsewhere with `MOEIFY_CHECK=1`.
    """

    router: Router
    experts: Experts

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: nn.Module | None = None,
        *,
        memory: nn.Module | None = None,
        backend: str = "auto",
        context: Context | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.replace(router=router, experts=experts)
        self.shared = shared
        self.memory = memory
        self.backend = backend
        self.context = Context() if context is None else context
        self.name = name

    def replace(self, *, router: Router | None = None, experts: Experts | None = None) -> Self:
        """Put another router or other experts into the layer, in place; every router inside then holds its experts.

        A part that is not passed stays. Returns the layer. Assigning to `router` or `experts`, as PEFT does, also
        attaches the new experts to the routers, but does not compare the numbers of experts.

        Raises:
            ValueError: the router is for another number of experts, or cannot work with these; the layer is unchanged.
        """
        router = self.router if router is None else router
        experts = self.experts if experts is None else experts
        if (wanted := getattr(router, "num_experts", experts.num_experts)) != experts.num_experts:
            raise ValueError(
                f"{type(router).__name__} routes to {wanted} experts, and {type(experts).__name__} holds "
                f"{experts.num_experts}; make both with the same number"
            )
        _attach(router, experts)
        super().__setattr__("router", router)
        super().__setattr__("experts", experts)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("router", "experts"):
            parts = dict(self.named_children()) | {name: value}
            _attach(parts["router"], parts["experts"])
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _attach(self.router, self.experts)  # copies of routers hold no experts

    def forward(self, x: Float[Tensor, "... D"], *others: Any, **named: Any) -> Any:
        """Route the tokens, run their experts, and add the outputs of the shared module and of the memory.

        Args:
            x: the tokens.
            others: what whole modules as experts (`Sequences`) are called with beside them.
            named: the same, by name.

        Raises:
            TypeError: tokens that are not of floating point, or arguments that the experts do not take.
        """
        if not (isinstance(x, Tensor) and x.is_floating_point()):
            got = x.dtype if isinstance(x, Tensor) else given.named(x)
            raise TypeError(f"{self.name or 'a sparse layer'} takes tokens of a floating-point dtype, but got {got}")
        routing = self.router(x, self.context)
        self._require_finite(routing)
        if isinstance(self.experts, Sequences):
            return self.experts.mixed(x, routing, others, named)
        if others or named:
            raise TypeError(f"{self.name or 'a sparse layer'} takes only its tokens, and was given more arguments")
        y = backends.run(self.backend, x, routing, self.experts)
        y = y if self.shared is None else y + self.shared(x)
        return y if self.memory is None else y + self.memory(x, self.context)

    @property
    def weight(self) -> Tensor:
        """The weight of the linear layer beside the experts, whose dtype some models read (T5's do)."""
        return self.shared.weight  # pyrefly: ignore[missing-attribute]

    def _require_finite(self, routing: Routing) -> None:
        if torch.compiler.is_compiling() or routing.logits is None or _PASSES.get():
            return
        free = routing.logits.device.type == "cpu" or env.CHECK.is_on
        if free and not torch.isfinite(routing.logits.detach()).all():
            finite = torch.isfinite(routing.logits.detach()).all(-1)
            raise FloatingPointError(
                f"{self.name or 'a sparse layer'} was given activations that are not finite: the router logits of "
                f"{int((~finite).sum())} of {finite.numel()} tokens are NaN or infinite; the fault lies before this "
                "layer (an overflow, a bad batch, or a learning rate that is too high)"
            )

    def extra_repr(self) -> str:
        """How the layer is computed."""
        return f"backend={self.backend!r}"


_PASSES: ContextVar[bool] = ContextVar("nonfinite values pass", default=False)


@contextmanager
def passing_nonfinite() -> Generator[None]:
    """Context manager in which layers raise nothing at values that are not finite.

    For models that are sharded over ranks: one that raised in its forward pass would let the others wait in theirs.
    Whoever calls the model then checks its loss and gradients on all ranks.
    """
    before = _PASSES.set(True)
    try:
        yield
    finally:
        _PASSES.reset(before)


def _attach(router: nn.Module, experts: nn.Module) -> None:
    """Let every router inside a router hold the experts, with what was put around them."""
    for part in router.modules():
        if isinstance(part, Router):
            part.attach(as_experts(experts))
