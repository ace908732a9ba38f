"""The routing decision: a linear map from tokens to rows sorted by expert, and one back.

A sparse layer is `y = C · experts(D · x)`. D says what each expert reads, C how its answers are weighed;
the pair (D, C) is a `Routing`. Losses, kernels, controllers and reports are functions of it.

Letters, one legend for the package: **T** tokens, **R** rows (one row is one token's visit to one expert),
**E** experts, **K** experts per token, **N** tokens per group (sequence, image), **S** slots per group,
**D** width in, **O** width out, **H** hidden width of an expert, **G** gates, **L** decisions (one per routed token,
or one per group).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Routing(ABC):
    """What each expert reads and how its answers are weighed.

    Attributes:
        counts: rows given to each expert.
        logits: what the router computed for each decision; padding is not among them.
        scores: the logits after the score function, unbiased and not yet selected from.
        group: the sequence or image that each decision belongs to.
        load: rows that each expert can expect under the router's noise, with a gradient; of noisy routers only.
        kind: of what type the sample of each decision is, of routers that are told.
    """

    counts: Int[Tensor, "E"]
    logits: Float[Tensor, "L E"] | None = None
    scores: Float[Tensor, "L E"] | None = None
    group: Int[Tensor, "L"] | None = None
    load: Float[Tensor, "E"] | None = None
    kind: Int[Tensor, "L"] | None = None

    @abstractmethod
    def dispatch(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "R D"]:
        """Give every expert its rows, sorted by expert."""

    @abstractmethod
    def combine(self, rows: Float[Tensor, "R O"]) -> Float[Tensor, "..."]:
        """Weigh the answers and add them up, in fp32, for every token."""


@dataclass(frozen=True, kw_only=True)
class Assignment(Routing):
    """A sparse decision: every row reads one token and adds its weighted answer to that token.

    Attributes:
        source: the token that a row reads, as an index into the flattened tokens.
        weight: one weight per row, or G weights for G read-outs of the same expert work.
        shape: the leading shape of the tokens, padding included.
        demand: rows that each expert was asked for, before any capacity limit.
        choice: which of its token's K choices a row is, best first.
        index: the K experts that every routed token asked for, if each asked for the same number.
        gates: the weights in the order of `index`.
        affinity: how strongly every expert answered every token, of routers that ask all experts first.
        answers: the experts' answers to the rows, of routers that have asked for them already.
        rest: what every token, padding included, gets beside its rows, of routers that speak for the other experts.
    """

    source: Int[Tensor, "R"]
    weight: Float[Tensor, "R *G"]
    shape: tuple[int, ...]
    demand: Int[Tensor, "E"]
    choice: Int[Tensor, "R"] | None = None
    index: Int[Tensor, "T K"] | None = None
    gates: Float[Tensor, "T K *G"] | None = None
    affinity: Float[Tensor, "L E"] | None = None
    answers: Float[Tensor, "R O"] | None = None
    rest: Float[Tensor, "all O"] | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens that were routed."""
        if self.index is not None:
            return len(self.index)
        return math.prod(self.shape) if self.group is None else len(self.group)

    @property
    def expert(self) -> Int[Tensor, "R"]:
        """The expert of every row."""
        return torch.repeat_interleave(self.counts, output_size=self.source.shape[0])

    def dispatch(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "R D"]:
        """Gather the token that each row reads."""
        return x.reshape(-1, x.shape[-1])[self.source]

    def only(self, kept: Bool[Tensor, "R"]) -> Assignment:
        """The decision without the other rows; what was asked for stays as it was."""
        return replace(
            self,
            counts=self.expert[kept].bincount(minlength=len(self.counts)),
            source=self.source[kept],
            weight=self.weight[kept],
            choice=None if self.choice is None else self.choice[kept],
            answers=None if self.answers is None else self.answers[kept],
        )

    def combine(self, rows: Float[Tensor, "R O"]) -> Float[Tensor, "..."]:
        """Add `weight · row` to the token of each row; gates, if any, become an axis before the width."""
        gates = self.weight.shape[1:]
        weighted = rows.float().view(-1, *[1] * len(gates), rows.shape[-1]) * self.weight.float().unsqueeze(-1)
        out = weighted.new_zeros(math.prod(self.shape), *gates, rows.shape[-1]) if self.rest is None else self.rest
        return out.index_add(0, self.source, weighted).view(*self.shape, *gates, rows.shape[-1]).to(rows.dtype)


@dataclass(frozen=True, kw_only=True)
class Mixture(Routing):
    """A dense decision: slots are weighted averages of tokens, and tokens weighted averages of slots (Soft MoE).

    Attributes:
        into: weight of every token in every slot; the slots of one expert lie side by side.
        out_of: weight of every slot in every token.
        source: the token at each place of a group, as an index into the flattened tokens; places that fill up a short
            group have no weight. None where the tokens are laid out by group.
        shape: the leading shape of the tokens, padding included; with `source` only.
    """

    into: Float[Tensor, "*B N S"]
    out_of: Float[Tensor, "*B N S"]
    source: Int[Tensor, "*B N"] | None = None
    shape: tuple[int, ...] = ()

    def dispatch(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "R D"]:
        """Average the tokens into slots, and put the slots of one expert from all groups together."""
        if self.source is not None:
            tokens = x.reshape(-1, x.shape[-1]).index_select(0, self.source.flatten())
            x = tokens.view(*self.source.shape, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            slots = torch.einsum("...ns,...nd->...sd", self.into, x.float())
        by_group = slots.reshape(-1, *slots.shape[-2:]).unflatten(1, (self.counts.shape[0], -1))  # (B, E, S / E, D)
        return by_group.transpose(0, 1).flatten(0, 2).to(x.dtype)

    def combine(self, rows: Float[Tensor, "R O"]) -> Float[Tensor, "..."]:
        """Average the slots back into tokens."""
        experts, (*batch, _, slots) = self.counts.shape[0], self.out_of.shape
        by_expert = rows.float().view(experts, -1, slots // experts, rows.shape[-1])  # (E, B, S / E, O)
        by_group = by_expert.transpose(0, 1).reshape(*batch, slots, rows.shape[-1])
        with torch.autocast(rows.device.type, enabled=False):
            y = torch.einsum("...ns,...so->...no", self.out_of, by_group)
        if self.source is not None:
            out = y.new_zeros(math.prod(self.shape), y.shape[-1])
            y = out.index_add(0, self.source.flatten(), y.flatten(0, -2)).view(*self.shape, y.shape[-1])
        return y.to(rows.dtype)


def assign(
    index: Int[Tensor, "T K"],
    gates: Float[Tensor, "T K *G"],
    num_experts: int,
    *,
    shape: tuple[int, ...] | None = None,
    positions: Int[Tensor, "T"] | None = None,
    logits: Float[Tensor, "L E"] | None = None,
    scores: Float[Tensor, "L E"] | None = None,
    group: Int[Tensor, "L"] | None = None,
    load: Float[Tensor, "E"] | None = None,
) -> Assignment:
    """Turn every token's chosen experts and their weights into rows sorted by expert, earlier tokens first.

    Args:
        index: the chosen experts.
        gates: the weights of the chosen experts.
        num_experts: E.
        shape: leading shape of all tokens, `(T,)` if not given.
        positions: where the T routed tokens lie among all tokens, if padding was left out.
        logits: kept in the decision.
        scores: kept in the decision.
        group: kept in the decision.
        load: kept in the decision.
    """
    tokens, k = index.shape
    experts = index.flatten()
    order = experts.sort(stable=True).indices
    source = order // k
    counts = experts.new_zeros(num_experts).scatter_add_(0, experts, torch.ones_like(experts))
    return Assignment(
        counts=counts,
        demand=counts,
        logits=logits,
        scores=scores,
        group=group,
        load=load,
        source=source if positions is None else positions[source],
        weight=gates.flatten(0, 1)[order],
        choice=order % k,
        shape=(tokens,) if shape is None else shape,
        index=index,
        gates=gates,
    )


def assign_where(
    chosen: Bool[Tensor, "T E"],
    weight: Float[Tensor, "T E *G"],
    *,
    shape: tuple[int, ...] | None = None,
    positions: Int[Tensor, "T"] | None = None,
    logits: Float[Tensor, "L E"] | None = None,
    scores: Float[Tensor, "L E"] | None = None,
    group: Int[Tensor, "L"] | None = None,
    load: Float[Tensor, "E"] | None = None,
) -> Assignment:
    """Turn a table of which token uses which expert into rows sorted by expert, earlier tokens first.

    Args:
        chosen: which experts a token uses; any number of them.
        weight: the weights, of which the chosen ones count.
        shape: leading shape of all tokens, `(T,)` if not given.
        positions: where the T routed tokens lie among all tokens, if padding was left out.
        logits: kept in the decision.
        scores: kept in the decision.
        group: kept in the decision.
        load: kept in the decision.
    """
    expert, token = chosen.t().nonzero(as_tuple=True)
    worth = weight.detach().flatten(2).sum(-1) if weight.dim() > 2 else weight.detach()
    best_first = worth.masked_fill(~chosen, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    counts = chosen.sum(0)
    return Assignment(
        counts=counts,
        demand=counts,
        logits=logits,
        scores=scores,
        group=group,
        load=load,
        source=token if positions is None else positions[token],
        weight=weight[token, expert],
        choice=best_first.argsort(-1)[token, expert],
        shape=(chosen.shape[0],) if shape is None else shape,
    )
