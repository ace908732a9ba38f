"""What a router must be: a module that turns tokens into a routing decision."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.context import Context
from moeify.routing import Routing


class Router(nn.Module, ABC):
    """Decides which expert reads which token.

    Attributes:
        causal: whether a token's decision depends on no later token; `sparsify` refuses others in decoders.
        preserving: whether the weights of every token sum to 1, so that identical experts act as one.
    """

    causal: bool = True
    preserving: bool = False

    @abstractmethod
    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Routing:
        """Route the real tokens among x."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Move, but never round: buffers of a router (a selection bias, say) stay in fp32."""
        exact = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device) if not buffer.is_meta else moved.to(buffer.dtype))
        return self


def real_tokens(x: Float[Tensor, "... D"], context: Context) -> tuple[Float[Tensor, "T D"], Tensor | None]:
    """The tokens that are not padding, and their positions among all tokens (None if they are all)."""
    tokens = x.reshape(-1, x.shape[-1])
    positions = context.real(tokens.shape[0])
    return (tokens if positions is None else tokens[positions]), positions


def project(
    tokens: Float[Tensor, "T D"], weight: Float[Tensor, "E D"], bias: Float[Tensor, "E"] | None = None
) -> Float[Tensor, "T E"]:
    """Router logits, computed in fp32 whatever the dtype of the model and whether autocast is on."""
    with torch.autocast(tokens.device.type, enabled=False):
        return nn.functional.linear(tokens.float(), weight.float(), None if bias is None else bias.float())
