"""Extraction: the gates of one level of PLE (progressive layered extraction), each with an input of its own."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, project, real_tokens
from moeify.routers.multi_gate import decisions, visible, xavier
from moeify.routing import Assignment


@register("router", "extraction")
class Extraction(Router):
    """A gate per task over its own and the shared experts, and a shared gate over all (PLE, RecSys 2020, section 4.2).

        g_k = softmax(W_k x_k) over the experts of task k and the shared ones;  g_s = softmax(W_s x_s) over all
        y_k = Σ_j g_kj f_j;  y_s = Σ_j g_sj f_j

    A token is the concatenation of the level's inputs: x_1 .. x_n of the tasks, then x_s of the shared experts. The
    layer's output is (..., G, O): y_1 .. y_n, and y_s if there is a shared gate. Experts read an input of their own
    too, by `moeify.experts.OfInputs`; `moeify.ple.ple` stacks such levels.

    Args:
        width: (n + 1) · D.
        num_experts: E.
        tasks: n.
        private: experts that belong to each task alone, the first of them to the first task; all others are shared.
        shared_gate: output y_s too, which the next level reads; the last level has no shared gate.

    Raises:
        ValueError: a width that is no multiple of n + 1; private experts that do not fit, see `MultiGate`.
    """

    weights_sum_to_one = True

    def __init__(self, width: int, num_experts: int, *, tasks: int, private: int = 1, shared_gate: bool = True) -> None:
        super().__init__()
        sees = visible(num_experts, tasks, private)
        if width % (tasks + 1):
            raise ValueError(
                f"a width of {width} does not hold {tasks + 1} inputs of one width: one for each of {tasks} tasks, and "
                "one for the shared experts"
            )
        every = torch.ones(1 if shared_gate else 0, num_experts, dtype=torch.bool)
        self.num_experts, self.tasks, self.private, self.shared_gate = num_experts, tasks, private, shared_gate
        self.register_buffer("sees", torch.cat([sees, every]), persistent=False)
        self.weight = xavier(len(self.sees), num_experts, width // (tasks + 1))

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Give every real token to every expert, with one weight per gate."""
        tokens = real_tokens(x, context)
        inputs = tokens.x.unflatten(-1, (self.tasks + 1, -1))
        logits = torch.stack([project(inputs[:, g], gate) for g, gate in enumerate(self.weight)], dim=1)
        logits = logits.masked_fill(~self.sees, torch.finfo(logits.dtype).min)
        scores = logits.softmax(-1)
        indices = torch.arange(self.num_experts, device=x.device).expand(scores.shape[0], -1)
        return tokens.assign(indices, scores.mT, self.num_experts, decisions(tokens, logits, scores))

    def extra_repr(self) -> str:
        """The tasks, and the experts that each has."""
        return f"experts={self.num_experts}, tasks={self.tasks}, private={self.private}, shared_gate={self.shared_gate}"
