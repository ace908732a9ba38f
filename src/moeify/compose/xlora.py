"""X-LoRA: a forward pass without adapters feeds a small network, whose outputs weight the adapters in a second pass."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.context import extra_inputs
from moeify.routers.base import k_best
from moeify.routers.input_weights import InputWeights


class XLoRA(nn.Module):
    """A model with adapters whose every call is two forward passes (X-LoRA, arXiv 2402.07148).

        h = last hidden states of the model without its adapters        no gradient
        g = softmax(MLP(h) / τ)                                          per token, shared by all layers or per layer
        y = W u + Σ_j g_j s_j B_j A_j u                                  in the second pass, in every adapted layer

    Args:
        model: of transformers, with `InputWeights` routers and one number of experts everywhere.
        width: width of its hidden states.
        depth: linear layers of the network, with ReLU and dropout in between.
        hidden: their width.
        dropout: dropout probability between them.
        temperature: τ.
        layerwise: weights for every layer rather than the same for all.
        k: how many of the weights are kept for each token; the others are 0, and their adapters do not run.

    Raises:
        ValueError: a model without such routers, or with different numbers of experts; a depth below 1; k outside 1..E;
            in `forward`, a KV cache, which both passes would write to.
    """

    def __init__(
        self,
        model: nn.Module,
        width: int,
        *,
        depth: int = 1,
        hidden: int = 2048,
        dropout: float = 0.2,
        temperature: float = 1.0,
        layerwise: bool = False,
        k: int | None = None,
    ) -> None:
        super().__init__()
        routers = [part for part in model.modules() if isinstance(part, InputWeights)]
        sizes = sorted({router.num_experts for router in routers})
        if len(sizes) != 1:
            raise ValueError(
                "X-LoRA weighs the same experts in every layer, and found "
                f"{sizes or 'no layer with an InputWeights router'}; make the model with "
                "router=InputWeights, and adapters that are all in the same places"
            )
        if depth < 1:
            raise ValueError(f"depth={depth} must be a number of layers; choose depth >= 1")
        if k is not None and not 1 <= k <= sizes[0]:
            raise ValueError(f"k={k} of {sizes[0]} experts; choose 1 <= k <= {sizes[0]}")
        self.keys = {router.key for router in routers}
        for number, router in enumerate(routers):
            router.number = number
        self.model, self.num_experts, self.layers = model, sizes[0], len(routers) if layerwise else 1
        self.temperature, self.k = temperature, k
        like = next(model.parameters())
        widths = [width, *[hidden] * (depth - 1), self.num_experts * self.layers]
        self.classifier = nn.Sequential(*_network(widths, dropout)).to(like.device, like.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the second pass."""
        if kwargs.get("past_key_values") is not None or kwargs.get("cache") is not None:
            raise ValueError(
                "X-LoRA runs the model twice per call, which would fill a KV cache twice; pass use_cache=False"
            )
        weights = self.weights(*args, **kwargs)
        with extra_inputs(self.model, **dict.fromkeys(self.keys, weights)):
            return self.model(*args, **kwargs)

    def weights(self, *args: Any, **kwargs: Any) -> Float[Tensor, "B N layers E"]:
        """The weights that the first pass gives; of one layer where all get the same."""
        first = {name: value for name, value in kwargs.items() if name != "labels"}
        first |= {"output_hidden_states": True, "return_dict": True, "use_cache": False}
        with torch.no_grad(), extra_inputs(self.model, **dict.fromkeys(self.keys, torch.tensor(0.0))):
            states = self.model(*args, **first).hidden_states[-1]
        logits = self.classifier(states).unflatten(-1, (self.layers, self.num_experts))
        scores = (logits / self.temperature).softmax(-1)
        if self.k is None:
            return scores
        best, indices = k_best(scores, self.k)
        return torch.zeros_like(scores).scatter(-1, indices, best)


def _network(widths: list[int], dropout: float) -> Iterator[nn.Module]:
    *hidden, last = pairwise(widths)
    for width, width_out in hidden:
        yield from (nn.Linear(width, width_out), nn.ReLU(), nn.Dropout(dropout))
    yield nn.Linear(*last)
