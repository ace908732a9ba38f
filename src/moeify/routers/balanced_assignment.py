"""BASE: in training every expert gets equally many tokens, and the sum of their scores is as large as it can be."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, library, nn

from moeify.context import Context
from moeify.registry import register
from moeify.routers.base import Router, k_best, project, real_tokens
from moeify.routing import Assignment, Evidence


@register("router", "balanced_assignment")
class BalancedAssignment(Router):
    """One expert per token by a linear assignment (BASE, arXiv 2103.16716, eqs. 2-5 and the authors' code in fairseq).

        a = argmax Σ_t w_{a_t} · x_t   subject to T / E tokens per expert      in training
        a_t = argmax_e w_e · x_t                                               in evaluation
        g_t = sigmoid(w_{a_t} · x_t)

    There is no loss to balance, and none is needed. Where E does not divide T, no expert gets more than ceil(T / E).
    Which expert a token gets in training depends on the whole batch: not for decoders that must not look ahead.

    Args:
        width: D.
        num_experts: E.
        gain: of the orthogonal initialisation of w.
    """

    causal = False
    k = 1

    def __init__(self, width: int, num_experts: int, *, gain: float = 0.1) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(num_experts, width), gain=gain))

    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Assignment:
        """Route the real tokens evenly in training, greedily in evaluation."""
        tokens = real_tokens(x, context)
        logits = project(tokens.x, self.weight)
        scores = logits.sigmoid()
        expert = assign_evenly(logits.detach()) if self.training else logits.argmax(-1)
        indices = expert.unsqueeze(-1)
        evidence = Evidence(logits=logits, scores=scores)
        return tokens.assign(indices, scores.gather(-1, indices), self.num_experts, evidence)

    def extra_repr(self) -> str:
        """The experts."""
        return f"experts={self.num_experts}"


@library.custom_op(  # one operator, as the number of rounds depends on the values, which no compiler can trace
    "moeify::assign_evenly", mutates_args=(), schema="(Tensor scores, float precision=0.02) -> Tensor"
)
def assign_evenly(scores: Float[Tensor, "T E"], precision: float = 0.02) -> Int[Tensor, "T"]:
    """The expert of each token, at most ceil(T / E) tokens per expert, of nearly the largest sum of scores.

    Bertsekas' auction: tokens without a slot bid for one at the expert of the largest score less price, up to the
    price at which their second best expert is as good; an expert keeps its highest bids, and its price is the lowest
    of them.

    Args:
        scores: of every token for every expert.
        precision: the sum is at most T · precision · (max - min) below the largest; the authors take 0.02.
    """
    tokens, experts = scores.shape
    if experts == 1:
        return scores.new_zeros(tokens, dtype=torch.long)
    places = -(-tokens // experts)
    indifferent = scores.new_zeros(places * experts - tokens, experts)  # they fill the places that are left
    scores = torch.cat([scores, indifferent])
    raise_by = (precision * (scores.max() - scores.min())).clamp_min(1e-6)
    bids = scores.new_full(scores.shape, -torch.inf)  # for the places that tokens have
    while len(waiting := bids.isneginf().all(1).nonzero().squeeze(1)):
        price = bids.topk(places, dim=0).values[-1].clamp_min(0)  # 0 while there are free places
        value, expert = k_best(scores[waiting] - price, 2)
        bids[waiting, expert[:, 0]] = price[expert[:, 0]] + value[:, 0] - value[:, 1] + raise_by
        bids.scatter_(0, bids.argsort(dim=0, descending=True, stable=True)[places:], -torch.inf)
    return bids.argmax(1)[:tokens]


@assign_evenly.register_fake
def _(scores: Tensor, precision: float = 0.02) -> Tensor:
    return scores.new_empty(scores.shape[0], dtype=torch.long)
