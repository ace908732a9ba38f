"""A router with hidden layers, whose state is averaged over the depth of the model (ZAYA)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, best_indices, project, real_tokens
from moeify.routing import Assignment, Evidence


@register("router", "depth_averaged")
class DepthAveraged(Router):
    """Small hidden layers decide, and read what the layer before read too (ZAYA1, arXiv 2511.17127).

        h = W_d x + b + γ ⊙ h'                       h' the state of the layer before
        z = W_3 gelu(W_2 gelu(W_1 norm(h)))          W_1 and W_2 with biases
        s = softmax(z);  i = the k largest of s + selection bias;  g = s[i]

    The weights of the last `zero_experts` are 0: these experts skip the token. `sparsify` links the layers of a stack;
    the first has no γ. The gradient flows on into the earlier routers.

    Args:
        width: D.
        num_experts: E, those that skip the token included.
        k: experts per token.
        state: the width of h.
        zero_experts: how many experts have a zero output, the last ones; their selection bias starts at -1.
        eps: of the norm.
        init_std: standard deviation of the initialisation of the matrices.

    Raises:
        ValueError: k outside 1..E; no expert beside zero experts; in `forward`, if the layer before has not decided,
            or for other tokens.
    """

    settable_k = True
    down: nn.Parameter
    down_bias: nn.Parameter
    first: nn.Parameter
    first_bias: nn.Parameter
    second: nn.Parameter
    second_bias: nn.Parameter

    def __init__(
        self, width: int, num_experts: int, *, k: int = 1, state: int = 256, zero_experts: int = 1, eps: float = 1e-5,
        init_std: float = 0.02,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 1 <= k <= num_experts or not 0 <= zero_experts < num_experts:
            raise ValueError(
                f"k={k} of {num_experts} experts, of which {zero_experts} have no output; choose 1 <= k <= E and "
                "0 <= zero_experts < E"
            )
        self.num_experts, self.k, self.zero_experts, self.eps = num_experts, k, zero_experts, eps
        for name, rows, columns in [("down", state, width), ("first", state, state), ("second", state, state)]:
            self.register_parameter(name, nn.Parameter(torch.randn(rows, columns) * init_std))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(rows)))
        self.weight = nn.Parameter(torch.randn(num_experts, state) * init_std)
        self.norm = nn.Parameter(torch.ones(state))
        self.register_parameter("decay", None)
        bias = torch.zeros(num_experts, dtype=torch.float32)
        bias[num_experts - zero_experts :] = -1.0
        self.register_buffer("selection_bias", bias)
        self._previous: tuple[Router, ...] = ()

    def link_to(self, previous: Router) -> Router:
        """Read the state of the previous router too."""
        self._previous = (previous,)  # not a submodule: it belongs to its own layer
        self.decay = nn.Parameter(torch.ones_like(self.norm))
        return self

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route every real token by its own state and that of the layer before."""
        tokens = real_tokens(x, context)
        h = project(tokens.x, self.down, self.down_bias)
        for previous in self._previous:
            h = h + self.decay * self._state(previous, context, h.shape[0])
        logits = self._logits(h)
        scores = logits.softmax(-1)
        indices = best_indices(scores.detach() + self.selection_bias, self.k)
        weights = scores.gather(-1, indices).masked_fill(indices >= self.num_experts - self.zero_experts, 0.0)
        evidence = Evidence(logits=logits, scores=scores, state=h)
        context.call.decisions[self] = routing = tokens.assign(indices, weights, self.num_experts, evidence)
        return routing

    def _logits(self, h: Float[Tensor, "T S"]) -> Float[Tensor, "T E"]:
        read = self.norm * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps))
        read = F.gelu(project(read, self.first, self.first_bias))
        return project(F.gelu(project(read, self.second, self.second_bias)), self.weight)

    def _state(self, previous: Router, context: Context, tokens: int) -> Float[Tensor, "T S"]:
        decided = context.call.decisions.get(previous)
        if decided is None or decided.evidence.state is None or decided.evidence.state.shape[0] != tokens:
            raise ValueError(
                "the sparse layer before has left no state for these tokens in this forward pass; run the whole model, "
                "with one context for its layers"
            )
        return decided.evidence.state

    def extra_repr(self) -> str:
        """Experts per token, and whether there is a layer before."""
        return f"experts={self.num_experts}, k={self.k}, averaged={bool(self._previous)}"
