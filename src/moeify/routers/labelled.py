"""Labels for losses: an input with a label per token or sample is kept with the decisions of any router."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, real_tokens
from moeify.routers.topk import TopK
from moeify.routing import Routing


class Labelled(Router):
    """Returns the decision of another router, and keeps a label of each decision for losses that need one.

    The label is an input of the model, or a column of the data that a trainer passes on: the modality of a token, whose
    entropies LIMoE separates (`losses.local_entropy(routing, label=0)`), or the super-class of an image, which
    supervises Mobile V-MoE's router (`losses.supervision`). The choice does not depend on it. Without this
    input the decision has no labels.

    Args:
        router: the wrapped router.
        key: the name of the model's input that holds the label, of shape (B,) or (B, N).

    Raises:
        ValueError: in `forward`, an input that fits neither tokens nor sequences.
    """

    def __init__(self, router: Router, *, key: str = "label") -> None:
        super().__init__()
        self.router, self.key = router, key
        self.causal, self.weights_sum_to_one = router.causal, router.weights_sum_to_one

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Routing:
        """Decide, and add the labels to the evidence."""
        routing = self.router(x, context)
        if context.look_up(self.key) is None:
            return routing
        tokens = real_tokens(x, context)
        label, of = tokens.keys(context, self.key), routing.sequence_id
        if of is not None and len(of) != len(label):  # decisions of sequences
            label = label.new_zeros(int(of.max()) + 1).scatter(0, tokens.sequence_id, label)[of]
        return replace(routing, evidence=replace(routing.evidence, label=label))

    def extra_repr(self) -> str:
        """The input that holds the label."""
        return f"key={self.key!r}"


@register("router", "labelled")
def labelled(
    width: int, num_experts: int, *, router: Callable[[int, int], Router] = TopK, key: str = "label"
) -> Labelled:
    """A `Labelled` around the router that `router(width, num_experts)` makes, for recipes."""
    return Labelled(router(width, num_experts), key=key)
