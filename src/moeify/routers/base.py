"""The base class of routers, modules that turn tokens into a routing decision, and helpers to write one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moeify.context import Context
from moeify.routing import Assignment, Evidence, Routing, assign, assign_where


class Router(nn.Module, ABC):
    """Decides which expert reads which token.

    Attributes:
        causal: whether a token's decision depends on no later token; `sparsify` refuses others in decoders.
        settable_k: whether its `k` may be set between two steps, as `moeify.train.KSchedule` does.
        weights_sum_to_one: whether the weights of every token sum to 1, so that identical experts act as one.
    """

    causal: bool = True
    weights_sum_to_one: bool = False
    settable_k: ClassVar[bool] = False
    _experts: tuple[Any, ...] = ()

    @abstractmethod
    def forward(self, x: Float[Tensor, "... D"], context: Context) -> Routing:
        """Route the real tokens among x."""

    def attach(self, experts: Any) -> None:
        """Keep a reference to the layer's experts; by default a router reads the tokens only, and keeps none.

        `MoE` calls it of its router and of every router inside it, whenever its experts or its router change. Keep them
        as `self._experts = (experts,)`: there PyTorch does not look for parameters, which are the layer's, and a copy
        of the router alone holds none.
        """

    def begin_step(self, step: int, seed: int, routers: Sequence[Router]) -> None:
        """Prepare for a training step, which by default needs nothing; the function `begin_step` calls it.

        What is drawn here must follow from seed and step alone, so that it is the same on every rank, in every
        micro-batch, when a step is recomputed and when a run is resumed.

        Args:
            step: the number of the optimizer step, from 0.
            seed: of the run.
            routers: all routers of the model in their order, this one among them.
        """

    def link_to(self, previous: Router) -> Router:
        """Link this router to that of the previous sparse layer in the stack, or return one that replaces it.

        `sparsify` calls it of every router but the first of a stack, and installs what it returns; linked routers
        leave their decisions in `context.call.decisions`. By default a router decides alone and returns itself; one
        that wraps another as `self.router` links that one to what the previous layer's wraps.
        """
        inside, before = getattr(self, "router", None), getattr(previous, "router", None)
        if isinstance(inside, Router) and isinstance(before, Router):
            self.router = inside.link_to(before)
        return self

    def rows_per_token(self, tokens: int | None = None) -> float | None:
        """Rows that the experts compute per token in evaluation, by which `moeify.flops` counts; None for E.

        The average if it is known, else the maximum: by default k, of this router or of the
        first one inside it.

        Args:
            tokens: N, the length of a sequence or image, if it is known.
        """
        inside = (part.rows_per_token(tokens) for part in self.children() if isinstance(part, Router))
        return getattr(self, "k", None) or next(inside, None)

    @property
    def mixing_flops(self) -> int:
        """FLOPs per token beside the router's matrices: 0 where a row is a copy of its token."""
        return 0

    @property
    def keeps_scores(self) -> bool:
        """Whether its decisions keep scores of all experts, on which balance losses act; by default as those inside."""
        return all(part.keeps_scores for part in self.children() if isinstance(part, Router))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_experts"}

    def extra_repr(self) -> str:
        """The experts and how many of them a token gets, where the router has these as attributes."""
        known = {"experts": getattr(self, "num_experts", None), "k": getattr(self, "k", None)}
        return ", ".join(f"{name}={value}" for name, value in known.items() if value is not None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Move, but never round: buffers of a router, such as a selection bias, stay in fp32."""
        exact = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device) if not buffer.is_meta else moved.to(buffer.dtype))
        return self


def begin_step(model: nn.Module, step: int, *, seed: int = 0) -> None:
    """Prepare every router of a model for a training step; the trainer of `moeify.train` calls it."""
    routers = [part for part in model.modules() if isinstance(part, Router)]
    for router in routers:
        router.begin_step(step, seed, routers)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a layer's input that are not padding, and their positions in it.

    Attributes:
        x: the real tokens.
        shape: leading shape of the input, padding included.
        positions: the real tokens among all flattened tokens, None if they are all.
        sequence_id: the sequence, document or image of each real token.
        common_length: the length of all sequences, None where padding or packing may make them differ.
    """

    x: Float[Tensor, "T D"]
    shape: tuple[int, ...]
    positions: Int[Tensor, "T"] | None
    sequence_id: Int[Tensor, "T"]
    common_length: int | None = None

    def assign(
        self,
        indices: Int[Tensor, "T K"],
        weights: Float[Tensor, "T K *G"],
        num_experts: int,
        evidence: Evidence | None = None,
    ) -> Assignment:
        """The decision that gives every token its K experts."""
        evidence = self._of_tokens(evidence)
        return assign(indices, weights, num_experts, shape=self.shape, positions=self.positions, evidence=evidence)

    def assign_where(
        self, chosen: Bool[Tensor, "T E"], weight: Float[Tensor, "T E *G"], evidence: Evidence | None = None
    ) -> Assignment:
        """The decision that gives every token the experts marked in a mask (T, E)."""
        evidence = self._of_tokens(evidence)
        return assign_where(chosen, weight, shape=self.shape, positions=self.positions, evidence=evidence)

    def _of_tokens(self, evidence: Evidence | None) -> Evidence:
        """The evidence with the sequences of the tokens, unless it names those of its decisions."""
        if evidence is None:
            return Evidence(sequence_id=self.sequence_id)
        return replace(evidence, sequence_id=self.sequence_id) if evidence.sequence_id is None else evidence

    def members(self) -> list[Int[Tensor, "N"]]:
        """The tokens of each sequence or image, in order."""
        _, sequence, sizes = self.sequence_id.unique(return_inverse=True, return_counts=True)
        return list(sequence.argsort(stable=True).split(sizes.tolist()))

    def by_sequence(self) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
        """The tokens of each sequence or image as rows of one table, and which entries of it are tokens."""
        if self.common_length is not None:
            table = self.sequence_id.sort(stable=True).indices.view(-1, self.common_length)
            return table, torch.ones_like(table, dtype=torch.bool)
        ids, sequence = self.sequences()
        sizes = torch.zeros_like(ids).index_add(0, sequence, torch.ones_like(sequence))
        ordered = sequence.sort(stable=True)
        token = torch.arange(sequence.shape[0], device=sequence.device)
        place = token - (sizes.cumsum(0) - sizes)[ordered.values]
        longest = self.shape[-1] if torch.compiler.is_exporting() else int(sizes.max())
        table = token.new_zeros(ids.shape[0], longest).index_put((ordered.values, place), ordered.indices)
        return table, torch.arange(longest, device=table.device) < sizes.unsqueeze(1)

    def sequences(self) -> tuple[Int[Tensor, "B"], Int[Tensor, "T"]]:
        """The sequences or images that have tokens, and which of these each token belongs to; in a graph, all rows."""
        if torch.compiler.is_exporting():  # their number must follow from shapes
            return torch.arange(self.shape[0], device=self.sequence_id.device), self.sequence_id
        return self.sequence_id.unique(return_inverse=True)

    def keys(self, context: Context, name: str) -> Int[Tensor, "T"]:
        """The value of the model's input `name`, (B, N) or (B,), for each token or for its sequence.

        Raises:
            ValueError: the model was called without it, or it fits neither tokens nor sequences.
        """
        given = context.look_up(name)
        if given is None:
            raise ValueError(
                f"this router looks up {name!r}, but the model was called without it; it was given: "
                f"{', '.join(context.call.inputs) or 'nothing'}"
            )
        if given.shape == self.shape or (given.numel(),) == self.shape:
            keys = given.flatten() if self.positions is None else given.flatten()[self.positions]
        elif given.dim() == 1 and len(given) > int(self.sequence_id.max()):
            keys = given[self.sequence_id]
        else:
            raise ValueError(
                f"{name!r} has shape {tuple(given.shape)}, which fits neither the tokens {self.shape} of the layer nor "
                f"their {int(self.sequence_id.max()) + 1} sequences (documents, where rows are packed); "
                "name an input that does by key=, or choose another recipe: a decoder or second tower has other tokens"
            )
        return keys.long()


def real_tokens(x: Float[Tensor, "... D"], context: Context) -> Tokens:
    """The tokens of x that are not padding."""
    tokens, shape, call = x.reshape(-1, x.shape[-1]), x.shape[:-1], context.call
    sequence_id, positions = call.sequence_ids(shape).to(x.device), call.real(shape)
    if positions is None:
        return Tokens(tokens, shape, None, sequence_id, call.common_length(shape))
    return Tokens(tokens[positions], shape, positions, sequence_id[positions])


def project(
    tokens: Float[Tensor, "T D"], weight: Float[Tensor, "E D"], bias: Float[Tensor, "E"] | None = None
) -> Float[Tensor, "T E"]:
    """Router logits, computed in fp32 for any dtype of the model, also under autocast."""
    with torch.autocast(tokens.device.type, enabled=False):
        return nn.functional.linear(tokens.float(), weight.float(), None if bias is None else bias.float())


def k_best(scores: Float[Tensor, "... E"], k: int) -> tuple[Float[Tensor, "... K"], Int[Tensor, "... K"]]:
    """The k largest of each row and their indices, best first, and of equals the first one first (as in JAX)."""
    if k == 1:
        first = scores.max(-1, keepdim=True)
        return first.values, first.indices
    indices = best_indices(scores, k)
    return scores.gather(-1, indices), indices


def best_indices(scores: Float[Tensor, "... E"], k: int) -> Int[Tensor, "... K"]:
    """The indices of the k largest of each row, best first, and of equals the first one first (as in JAX).

    `torch.topk` leaves the order of equals open, so that a router that starts at zero would choose by the backend.
    """
    rest = scores.detach()
    exporting = torch.compiler.is_exporting()  # where no size is known
    if k > 1 and (exporting or rest.is_cuda or rest.numel() <= _FEW * k or 2 * k >= rest.shape[-1]):
        return rest.sort(dim=-1, descending=True, stable=True).indices.narrow(-1, 0, k)
    found = [rest.max(-1, keepdim=True).indices]  # of equals the first, by its definition
    while len(found) < k:
        rest = rest.scatter(-1, found[-1], float("-inf"))
        found.append(rest.max(-1, keepdim=True).indices)
    return found[0] if k == 1 else torch.cat(found, dim=-1)


_FEW = 512  # scores per choice that a CPU sorts in the time of choosing one by one
