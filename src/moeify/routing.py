"""The routing decision: a linear map from tokens to rows sorted by expert, and one back.

A sparse layer is `y = C · experts(D · x)`. D says what each expert reads, C how its outputs are weighted;
the pair (D, C) is a `Routing`. Losses, kernels, controllers and reports are functions of it.

Letters, one legend for the package: **T** tokens, **R** rows (one row is one (token, expert) pair),
**E** experts, **K** experts per token, **N** tokens per sequence or image, **S** slots per sequence or image,
**D** width in, **O** width out, **H** hidden width of an expert, **G** gates (of MMoE, one layer output each),
**L** decisions (one per routed token, or one per sequence or image).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moeify.exportable import expert_of_rows


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a router computed to reach its decision, as losses, controllers and reports read it; padding is excluded.

    Attributes:
        logits: the router's output for each decision.
        scores: the logits after the score function, without selection bias.
        sequence_id: the sequence or image that each decision belongs to.
        expected_load: rows that each expert can expect under the router's noise, with a gradient (noisy routers).
        label: of each decision's token or sample, an input of the model: its modality, task type or super-class.
        affinity: the affinity of every expert for every token (CompeteSMoE).
        rows: the router's rows for the experts in use, with a gradient (DynMoE).
        unserved: the sum of the tokens without an expert (DynMoE).
        state: what the router of the next layer reads of this one (ZAYA).
    """

    logits: Float[Tensor, "L E"] | None = None
    scores: Float[Tensor, "L E"] | None = None
    sequence_id: Int[Tensor, "L"] | None = None
    expected_load: Float[Tensor, "E"] | None = None
    label: Int[Tensor, "L"] | None = None
    affinity: Float[Tensor, "L E"] | None = None
    rows: Float[Tensor, "U D"] | None = None
    unserved: Float[Tensor, "D"] | None = None
    state: Float[Tensor, "L S"] | None = None


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The K experts that every routed token chose, before any capacity limit, and their weights.

    Attributes:
        indices: the chosen experts.
        weights: their weights, in the same order.
    """

    indices: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K *G"]

    @property
    def k(self) -> int:
        """Experts per token."""
        return self.indices.shape[1]


@dataclass(frozen=True, kw_only=True)
class Routing(ABC):
    """What each expert reads and how its outputs are weighted.

    Attributes:
        counts: rows given to each expert.
        shape: the leading shape of the tokens, padding included.
        evidence: what the router computed to reach the decision.
        expert_outputs: the experts' outputs for the rows, of routers that ran them already.
    """

    counts: Int[Tensor, "E"]
    shape: tuple[int, ...]
    evidence: Evidence = field(default_factory=Evidence)
    expert_outputs: Float[Tensor, "R O"] | None = None

    @property
    def logits(self) -> Float[Tensor, "L E"] | None:
        """The router's output for each decision, if it computes any."""
        return self.evidence.logits

    @property
    def scores(self) -> Float[Tensor, "L E"] | None:
        """The logits after the score function, if the router has one."""
        return self.evidence.scores

    @property
    def sequence_id(self) -> Int[Tensor, "L"] | None:
        """The sequence or image that each decision belongs to, if it is known."""
        return self.evidence.sequence_id

    @property
    def assigned(self) -> Int[Tensor, "E"] | None:
        """The load of every expert before any capacity limit, in rows; None of a dense mixture, always even."""
        return None

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """R, the rows that all experts together compute; known without synchronisation."""

    @abstractmethod
    def reads(self) -> Bool[Tensor, "all E"]:
        """Which experts read which tokens, padding included."""

    @abstractmethod
    def dispatch(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "R D"]:
        """Give every expert its rows, sorted by expert."""

    @abstractmethod
    def combine(self, rows: Float[Tensor, "R O"]) -> Float[Tensor, "..."]:
        """Weight the expert outputs and add them up, in fp32, for every token."""

    @abstractmethod
    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the decision is for tokens of this leading shape, as far as it records."""

    @abstractmethod
    def weight_table(self) -> Float[Tensor, "all W"]:
        """The weight of every expert at every token, padding included; no column for a dense mixture."""

    def for_other_experts(self) -> Self:
        """The same decision for the experts of another layer: without outputs of those that it was made for."""
        return self if self.expert_outputs is None else replace(self, expert_outputs=None)

    def detached(self) -> Self:
        """The same decision without the autograd graph that made it."""
        return _detached(self)


@dataclass(frozen=True, kw_only=True)
class Assignment(Routing):
    """A sparse decision: every row reads one token and adds its weighted expert output to that token.

    Attributes:
        source: the token that a row reads, as an index into the flattened tokens.
        weight: one weight per row, or G weights for G layer outputs from the same expert work.
        rank: which of its token's K choices a row is, 0 for the best.
        before_limit: rows assigned to each expert before a capacity limit; None where nothing was limited.
        choices: the experts that the tokens chose, if each chose the same number.
        default_output: what every token, padding included, gets beside its rows (Default MoE).
        input_weight: multiplies what each row reads (Llama 4); None for tokens as they are.
    """

    source: Int[Tensor, "R"]
    weight: Float[Tensor, "R *G"]
    rank: Int[Tensor, "R"] | None = None
    before_limit: Int[Tensor, "E"] | None = None
    choices: Choices | None = None
    default_output: Float[Tensor, "all O"] | None = None
    input_weight: Float[Tensor, "R"] | None = None

    @property
    def assigned(self) -> Int[Tensor, "E"]:
        """The load of every expert before any capacity limit, in rows."""
        return self.counts if self.before_limit is None else self.before_limit

    @property
    def is_limited(self) -> bool:
        """Whether the rows may differ from what the tokens chose, because a capacity dropped or moved some."""
        return self.before_limit is not None

    @property
    def has_all_rows(self) -> bool:
        """Whether every token, padding included, has the rows of all its K choices."""
        return self.choices is not None and len(self.source) == math.prod(self.shape) * self.choices.k

    @property
    def has_gate_axis(self) -> bool:
        """Whether a row has G weights, one per gate, instead of a single one."""
        return self.weight.dim() > 1

    @property
    def tokens(self) -> int:
        """The number of tokens that were routed."""
        if self.choices is not None:
            return self.choices.indices.shape[0]
        return math.prod(self.shape) if self.sequence_id is None else self.sequence_id.shape[0]

    @property
    def num_rows(self) -> int:
        """One per source."""
        return self.source.shape[0]

    @property
    def expert(self) -> Int[Tensor, "R"]:
        """The expert of every row."""
        return expert_of_rows(self.counts, self.num_rows)

    def reads(self) -> Bool[Tensor, "all E"]:
        """The weights of the rows."""
        found = self.counts.new_zeros(math.prod(self.shape), len(self.counts), dtype=torch.bool)
        found[self.source, self.expert] = True
        return found

    def for_other_experts(self) -> Self:
        """The same decision for the experts of another layer: without outputs of those that it was made for."""
        own = super().for_other_experts()
        return own if own.default_output is None else replace(own, default_output=None)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the tokens have this leading shape."""
        return tuple(self.shape) == tuple(shape)

    def dispatch(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "R D"]:
        """Gather the token that each row reads."""
        rows = x.reshape(-1, x.shape[-1])[self.source]
        return rows if self.input_weight is None else rows * self.input_weight.to(rows.dtype).unsqueeze(-1)

    def only(
        self, kept: Bool[Tensor, "R"] | Int[Tensor, "kept"] | slice, counts: Int[Tensor, "E"] | None = None
    ) -> Assignment:
        """The decision without the other rows; `assigned`, choices and evidence stay as they were.

        Args:
            kept: which rows are kept: a mask, their places, or a slice.
            counts: how many of them each expert has, if known.
        """
        return replace(
            self,
            counts=self.expert[kept].bincount(minlength=len(self.counts)) if counts is None else counts,
            source=self.source[kept],
            weight=self.weight[kept],
            rank=None if self.rank is None else self.rank[kept],
            expert_outputs=None if self.expert_outputs is None else self.expert_outputs[kept],
            input_weight=None if self.input_weight is None else self.input_weight[kept],
            before_limit=self.assigned,
        )

    def with_weight_sums_of(self, other: Assignment) -> Assignment:
        """The same rows with weights scaled so that those of every token sum to what they sum to in `other`."""
        before, after = other._weight_sums(), self._weight_sums()
        scale = (before / after.clamp_min(torch.finfo(self.weight.dtype).tiny))[self.source]
        return replace(self, weight=self.weight * scale)

    def _weight_sums(self) -> Float[Tensor, "all *G"]:
        zeros = self.weight.new_zeros(math.prod(self.shape), *self.weight.shape[1:])
        return zeros.index_add(0, self.source, self.weight)

    def weight_table(self) -> Float[Tensor, "all W"]:
        """The weight of every expert at every token; with gates, W = E · G."""
        weight = self.weight.float().flatten(1) if self.has_gate_axis else self.weight.float().unsqueeze(1)
        table = weight.new_zeros(math.prod(self.shape), len(self.counts), weight.shape[1])
        return table.index_put((self.source, self.expert), weight, accumulate=True).flatten(1)

    def combine(self, rows: Float[Tensor, "R O"]) -> Float[Tensor, "..."]:
        """Add `weight · row` to the token of each row; gates, if any, become an axis before the width."""
        gates = self.weight.shape[1:]
        weighted = rows.float().view(-1, *[1] * len(gates), rows.shape[-1]) * self.weight.float().unsqueeze(-1)
        out = self.default_output
        if out is None:
            out = weighted.new_zeros(math.prod(self.shape), *gates, rows.shape[-1])
        return out.index_add(0, self.source, weighted).view(*self.shape, *gates, rows.shape[-1]).to(rows.dtype)


@dataclass(frozen=True, kw_only=True)
class Mixture(Routing):
    """A dense decision: slots are weighted averages of tokens, and tokens weighted averages of slots (Soft MoE).

    Attributes:
        into: weight of every token in every slot; the slots of one expert are adjacent.
        out_of: weight of every slot in every token.
        source: the token at each place of a sequence or image, as an index into the flattened tokens; places that fill
            up a short one have no weight. None where the tokens are laid out as (B, N).
        shape: of no meaning without `source`.
    """

    into: Float[Tensor, "*B N S"]
    out_of: Float[Tensor, "*B N S"]
    source: Int[Tensor, "*B N"] | None = None
    shape: tuple[int, ...] = ()

    def dispatch(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "R D"]:
        """Average the tokens into slots, and put the slots of one expert from the whole batch together."""
        if self.source is not None:
            tokens = x.reshape(-1, x.shape[-1]).index_select(0, self.source.flatten())
            x = tokens.view(*self.source.shape, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            slots = torch.einsum("...ns,...nd->...sd", self.into, x.float())
        by_sequence = slots.reshape(-1, *slots.shape[-2:]).unflatten(1, (self.counts.shape[0], -1))  # (B, E, S / E, D)
        return by_sequence.transpose(0, 1).flatten(0, 2).to(x.dtype)

    def combine(self, rows: Float[Tensor, "R O"]) -> Float[Tensor, "..."]:
        """Average the slots back into tokens."""
        experts, (*batch, _, slots) = self.counts.shape[0], self.out_of.shape
        by_expert = rows.float().view(experts, -1, slots // experts, rows.shape[-1])  # (E, B, S / E, O)
        by_sequence = by_expert.transpose(0, 1).reshape(*batch, slots, rows.shape[-1])
        with torch.autocast(rows.device.type, enabled=False):
            y = torch.einsum("...ns,...so->...no", self.out_of, by_sequence)
        if self.source is not None:
            out = y.new_zeros(math.prod(self.shape), y.shape[-1])
            y = out.index_add(0, self.source.flatten(), y.flatten(0, -2)).view(*self.shape, y.shape[-1])
        return y.to(rows.dtype)

    @property
    def num_rows(self) -> int:
        """One per slot of every sequence or image."""
        return math.prod(self.into.shape[:-2]) * self.into.shape[-1]

    def reads(self) -> Bool[Tensor, "all E"]:
        """Every expert reads every token."""
        return self.counts.new_ones(self._tokens, len(self.counts), dtype=torch.bool)

    @property
    def _tokens(self) -> int:
        return math.prod(self.into.shape[:-1]) if self.source is None else math.prod(self.shape)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the tokens have this leading shape; without `source` any will do."""
        return self.source is None or tuple(self.shape) == tuple(shape)

    def weight_table(self) -> Float[Tensor, "all 0"]:
        """No columns: no expert is chosen."""
        return torch.zeros(self._tokens, 0, device=self.counts.device)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _detached(getattr(value, field.name)) for field in fields(value)})
    return value


def assign(
    indices: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K *G"],
    num_experts: int,
    *,
    shape: tuple[int, ...] | None = None,
    positions: Int[Tensor, "T"] | None = None,
    evidence: Evidence | None = None,
) -> Assignment:
    """Turn every token's chosen experts and their weights into rows sorted by expert, earlier tokens first.

    Args:
        indices: the chosen experts.
        weights: the weights of the chosen experts.
        num_experts: E.
        shape: leading shape of all tokens, `(T,)` if not given.
        positions: of the T routed tokens among all tokens, if padding was excluded.
        evidence: what the router computed to reach the decision.
    """
    tokens, k = indices.shape
    experts = indices.flatten()
    order = experts.sort(stable=True).indices
    source = order // k
    return Assignment(
        counts=experts.new_zeros(num_experts).scatter_add_(0, experts, torch.ones_like(experts)),
        evidence=evidence or Evidence(),
        source=source if positions is None else positions[source],
        weight=weights.flatten(0, 1)[order],
        rank=order % k,
        shape=(tokens,) if shape is None else shape,
        choices=Choices(indices=indices, weights=weights),
    )


def assign_where(
    chosen: Bool[Tensor, "T E"],
    weight: Float[Tensor, "T E *G"],
    *,
    shape: tuple[int, ...] | None = None,
    positions: Int[Tensor, "T"] | None = None,
    evidence: Evidence | None = None,
) -> Assignment:
    """Turn a table of which token uses which expert into rows sorted by expert, earlier tokens first.

    Args:
        chosen: which experts a token uses; any number of them.
        weight: the weights, of which the chosen ones count.
        shape: leading shape of all tokens, `(T,)` if not given.
        positions: of the T routed tokens among all tokens, if padding was excluded.
        evidence: what the router computed to reach the decision.
    """
    expert, token = chosen.t().nonzero(as_tuple=True)
    score = weight.detach().flatten(2).sum(-1) if weight.dim() > 2 else weight.detach()
    best_first = score.masked_fill(~chosen, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    return Assignment(
        counts=chosen.sum(0),
        evidence=evidence or Evidence(),
        source=token if positions is None else positions[token],
        weight=weight[token, expert],
        rank=best_first.argsort(-1)[token, expert],
        shape=(chosen.shape[0],) if shape is None else shape,
    )
