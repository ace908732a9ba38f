"""The laws (invariants) of routers, and `check_router`, which checks a custom router."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.context import Context
from moeify.documents import Packing
from moeify.experts import FFN
from moeify.moe import MoE
from moeify.routers.base import Router
from moeify.routing import Assignment, Routing
from moeify.testing.laws import BrokenLaw, check_laws, difference, gradients, trainable

Sees = Literal["token", "sequence", "batch"]
_WIDTH, _EXPERTS = 8, 4
_SEEDS = 12


def check_router(
    make: Callable[[int, int], Router],
    *,
    sees: Sees = "token",
    looks_up: Sequence[str] = (),
    compiles: bool = False,
    without: Collection[str] = (),
) -> None:
    """Check that a router satisfies the laws of routers.

    It is built for 8-dimensional tokens and 4 experts. Its matrices are drawn from a standard normal distribution, so
    that routing decisions have no near ties.

    Args:
        make: (width, experts) -> router, as in `Recipe(router=...)`: a class, or a partial of one.
        sees: what the routing of a token depends on in evaluation: the token, its sequence, or the batch.
        looks_up: model inputs that the router reads in addition to `input_ids`; the test passes integers below 12.
        compiles: also require that `torch.compile(fullgraph=True)` captures the router; takes seconds.
        without: names of laws that the method violates by design.

    Raises:
        BrokenLaw: the first law that is violated; an AssertionError.
        ValueError: a name in `without` that no law has.
    """
    laws = [*LAWS, *([torch_compile_captures_the_router] if compiles else [])]
    check_laws(laws, _Subject(make, sees, ("input_ids", *looks_up)), without)


@dataclass(frozen=True)
class _Batch:
    """The inputs of a layer in one forward pass.

    Attributes:
        x: the tokens.
        ids: the value of every model input that the router reads, one integer per token.
        mask: padding mask, True for real tokens; None without padding.
        batch_first: whether x is (B, N, D), else (N, B, D).
        documents: the document index of each token of packed sequences.
    """

    x: Float[Tensor, "... D"]
    ids: Int[Tensor, "..."]
    mask: Tensor | None = None
    batch_first: bool = True
    documents: Int[Tensor, "B N"] | None = None


def _batch(*shape: int, mask: Tensor | None = None) -> _Batch:
    return _Batch(torch.randn(*shape, _WIDTH), torch.randint(12, shape), mask)


def _alike(batch: _Batch) -> _Batch:
    """The batch with a common offset added to its tokens, so that most are routed to the same experts."""
    return _Batch(batch.x + 2 * torch.randn(_WIDTH), batch.ids)


@dataclass(frozen=True)
class _Subject:
    """A router under test."""

    make: Callable[[int, int], Router]
    sees: Sees
    names: tuple[str, ...]

    def layer(self, *, training: bool = False) -> MoE:
        """A new layer with a new router and randomly initialised experts."""
        router = self.make(_WIDTH, _EXPERTS)
        for parameter in router.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter)
        return MoE(router, FFN(_EXPERTS, _WIDTH, 6), backend="compose").train(training)

    def context(self, layer: MoE, batch: _Batch) -> Context:
        """Set a new context for a batch on the layer, and return it."""
        layer.context = Context()
        layer.context.mask(batch.mask)
        layer.context.call.batch_first = batch.batch_first
        layer.context.call.inputs.update(dict.fromkeys(self.names, batch.ids))
        if batch.documents is not None:
            layer.context.call.packing = Packing({"seq_idx": batch.documents}, (batch.x.shape[0], batch.x.shape[1]))
        return layer.context

    def route(self, layer: MoE, batch: _Batch) -> Routing:
        """The routing decision for a batch, with a fixed seed."""
        context = self.context(layer, batch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return layer.router(batch.x, context)

    def run(self, layer: MoE, batch: _Batch) -> Tensor:
        """The output of the layer for a batch, with a fixed seed."""
        self.context(layer, batch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return layer(batch.x)


def a_decision_is_a_map_to_sorted_rows_and_back(subject: _Subject) -> None:
    """Shapes and counts are consistent, rows index existing tokens, and no token is assigned to an expert twice."""
    law = "a_decision_is_a_map_to_sorted_rows_and_back"
    for shape in ((7,), (2, 5), (1, 1)):
        for training in (False, True):
            batch = _batch(*shape)
            routing = subject.route(subject.layer(training=training), batch)
            if not isinstance(routing, Routing):
                raise BrokenLaw(law, f"forward returned a {type(routing).__name__}", "return a moeify.Routing")
            counts = routing.counts
            if counts.shape != (_EXPERTS,) or counts.is_floating_point() or int(counts.min()) < 0:
                seen = f"counts are {counts.dtype} of shape {tuple(counts.shape)} for {_EXPERTS} experts"
                raise BrokenLaw(law, seen, "give the number of rows of every expert, as integers")
            rows = routing.dispatch(batch.x)
            if rows.shape != (int(counts.sum()), _WIDTH):
                seen = f"dispatch gave rows of shape {tuple(rows.shape)}, and counts sum to {int(counts.sum())}"
                raise BrokenLaw(law, seen, "give counts that belong to the rows")
            out = routing.combine(torch.randn(len(rows), _WIDTH))
            if out.shape[: len(shape)] != shape or out.shape[-1] != _WIDTH:
                seen = f"tokens of leading shape {shape} came back as {tuple(out.shape)}"
                raise BrokenLaw(law, seen, "pass the leading shape of x as `shape`; real_tokens(x, context) keeps it")
            if isinstance(routing, Assignment):
                _rows_are_sorted(law, routing, batch.ids.numel())


def _rows_are_sorted(law: str, routing: Assignment, tokens: int) -> None:
    source, expert = routing.source, routing.expert
    if len(source) and not 0 <= int(source.min()) <= int(source.max()) < tokens:
        raise BrokenLaw(law, f"rows read tokens {source.tolist()} of {tokens}", "let source be indices into the tokens")
    if len((source * _EXPERTS + expert).unique()) != len(source):
        raise BrokenLaw(law, "an expert reads a token twice", "let the experts of a token be different ones")
    if routing.choices is not None and routing.rank is not None and not routing.is_limited:
        chosen = routing.choices.indices[source, routing.rank]
        if not torch.equal(chosen, expert):
            seen = f"rows lie at experts {expert.tolist()}, and their tokens chose {chosen.tolist()}"
            raise BrokenLaw(law, seen, "sort rows by expert; tokens.assign(indices, weights, num_experts) does")


def padding_is_not_assigned(subject: _Subject) -> None:
    """Padding is not assigned to experts, and its values affect neither the outputs of real tokens nor gradients."""
    law, advice = "padding_is_not_assigned", "route real_tokens(x, context).x only, and let its assign() make the rows"
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    for training in (False, True):
        layer, batch = subject.layer(training=training), _batch(4, 5, mask=mask)
        routing = subject.route(layer, batch)
        if isinstance(routing, Assignment) and not mask.flatten()[routing.source].all():
            padding = int((~mask.flatten()[routing.source]).sum())
            raise BrokenLaw(law, f"{padding} of {len(routing.source)} rows read padding", advice)
        hidden = _Batch(batch.x.masked_fill(~mask.unsqueeze(-1), float("nan")), batch.ids, mask)
        a, b = (subject.run(each, tokens) for each, tokens in ((deepcopy(layer), batch), (layer, hidden)))
        if getattr(routing, "default_output", None) is None and b[~mask].count_nonzero():
            raise BrokenLaw(law, "the layer has an output for padding", advice)
        a, b = a[mask], b[mask]
        if (error := difference(b, a)) > 1e-6:
            seen = f"NaN in the padding changes the outputs of real tokens by {error:.2g}"
            raise BrokenLaw(law, seen, advice)
        if not all(g.isfinite().all() for g in gradients(b, list(layer.parameters()))):
            raise BrokenLaw(law, "NaN in the padding reaches a gradient", advice)


def more_padding_changes_nothing(subject: _Subject) -> None:
    """Additional padding does not change the outputs of real tokens."""
    batch = _batch(3, 4)
    mask = torch.arange(7).expand(3, 7) < 4
    padded = _Batch(torch.randn(3, 7, _WIDTH), torch.zeros(3, 7, dtype=torch.int64), mask)
    padded.x[:, :4], padded.ids[:, :4] = batch.x, batch.ids
    for training in (False, True):
        layer = subject.layer(training=training)
        if (error := difference(subject.run(deepcopy(layer), padded)[:, :4], subject.run(layer, batch))) > 1e-5:
            seen = f"three places of padding behind every sequence change its outputs by {error:.2g}"
            advice = "count and draw noise for real tokens only: len(real_tokens(x, context).x), not x.shape"
            raise BrokenLaw("more_padding_changes_nothing", seen, advice)


def the_order_of_tokens_does_not_matter(subject: _Subject) -> None:
    """Outputs are equivariant under permutation of the tokens, for routers with `sees="token"`."""
    if subject.sees != "token":
        return
    layer, batch = subject.layer(), _batch(16)
    order = torch.randperm(16)
    moved = _Batch(batch.x[order], batch.ids[order])
    if (error := difference(subject.run(layer, moved), subject.run(layer, batch)[order])) > 1e-5:
        raise BrokenLaw(
            "the_order_of_tokens_does_not_matter",
            f"outputs change by {error:.2g} when tokens change places",
            'let a token\'s decision depend on the token alone, or say sees="sequence" or sees="batch"',
        )


def sequences_do_not_see_each_other(subject: _Subject) -> None:
    """A sequence has the same outputs alone, in a batch, in a packed sequence, in sequence-first layout and flattened.

    Not checked for routers with `sees="batch"`.
    """
    if subject.sees == "batch":
        return
    law, layer, batch = "sequences_do_not_see_each_other", subject.layer(), _batch(3, 5)
    y = subject.run(layer, batch)
    for b in range(3):
        alone = subject.run(layer, _Batch(batch.x[b : b + 1], batch.ids[b : b + 1]))
        if (error := difference(alone, y[b : b + 1])) > 1e-5:
            seen = f"a sequence alone has outputs that differ by {error:.2g} from those in a batch"
            raise BrokenLaw(law, seen, 'decide within tokens.sequence_id, or say sees="batch"')
    flat = subject.run(layer, _Batch(batch.x.flatten(0, 1), batch.ids))
    first = subject.run(layer, _Batch(batch.x.transpose(0, 1), batch.ids.T, batch_first=False))
    for layout, other in (("flattened", flat.view_as(y)), ("sequence first", first.transpose(0, 1))):
        if (error := difference(other, y)) > 1e-5:
            seen = f"the same tokens {layout} have outputs that differ by {error:.2g}"
            raise BrokenLaw(law, seen, "take sequences from tokens.sequence_id, not from the shape of x")
    lengths, ids = (5, 1, 9), torch.arange(3).repeat_interleave(torch.tensor([5, 1, 9]))
    row = _Batch(batch.x.view(1, 15, -1), batch.ids.view(1, 15), documents=ids.unsqueeze(0))
    parts = (each.split(lengths, dim=1) for each in (row.x, row.ids, subject.run(layer, row)))
    for x, ids, packed in zip(*parts, strict=True):
        if (error := difference(subject.run(layer, _Batch(x, ids)), packed)) > 1e-5:
            seen = f"a document alone has outputs that differ by {error:.2g} from those in a packed row"
            raise BrokenLaw(law, seen, "take documents, which differ in length, from tokens.sequence_id")


def causal_is_declared_truthfully(subject: _Subject) -> None:
    """`causal` is True if and only if later tokens do not change the outputs of earlier ones."""
    law = "causal_is_declared_truthfully"
    layer = subject.layer()
    if layer.router.causal and (error := _influence_of_later_tokens(subject, layer)) > 1e-5:
        seen = f"it says causal = True, and later tokens change the outputs of earlier ones by {error:.2g}"
        raise BrokenLaw(law, seen, "set causal = False: in a decoder it would look at the tokens to be predicted")
    if not layer.router.causal:
        others = (layer, subject.layer(training=True))
        if max(_influence_of_later_tokens(subject, other) for other in others) <= 1e-5:
            seen = "it says causal = False, and later tokens changed no output of an earlier one"
            raise BrokenLaw(law, seen, "set causal = True: sparsify refuses other routers in decoders")


def _influence_of_later_tokens(subject: _Subject, layer: MoE) -> float:
    """The largest change of the outputs of the first 16 of 24 tokens when the last 8 are replaced."""
    changes = []
    for trial in range(_SEEDS):
        batch = _alike(_batch(1, 24)) if trial % 2 else _batch(1, 24)
        other = _Batch(torch.cat([batch.x[:, :16], 3 * torch.randn(1, 8, _WIDTH)], 1), batch.ids)
        before, after = (subject.run(deepcopy(layer), each)[:, :16] for each in (batch, other))
        changes.append(difference(after, before))
    return max(changes)


def weights_sum_to_one_is_declared_truthfully(subject: _Subject) -> None:
    """`weights_sum_to_one` is True if and only if a layer of identity experts is the identity in evaluation mode."""
    law = "weights_sum_to_one_is_declared_truthfully"
    layer = subject.layer()
    declared, error = layer.router.weights_sum_to_one, _distance_from_one(subject, layer)
    if declared and error > 1e-4:
        seen = f"it says that weights sum to 1, and identical experts do not act as one (off by {error:.2g})"
        raise BrokenLaw(law, seen, "set weights_sum_to_one = False: upcycling by copy would change the model")
    if not declared and max(error, _distance_from_one(subject, subject.layer(training=True))) <= 1e-4:
        seen = "it says that weights need not sum to 1, and they did for every token"
        raise BrokenLaw(law, seen, "set weights_sum_to_one = True: upcycling by copy needs it")


def _distance_from_one(subject: _Subject, layer: MoE) -> float:
    """The largest difference between input and output of a layer of identity experts."""
    errors = []
    for trial in range(_SEEDS):
        batch = _alike(_batch(4, 16)) if trial % 2 else _batch(4, 16)
        routing = subject.route(layer, batch)
        y = routing.combine(routing.dispatch(batch.x))
        errors.append(difference(y, batch.x.unsqueeze(-2).expand_as(y) if y.dim() > batch.x.dim() else batch.x))
    return max(errors)


def a_gradient_reaches_every_parameter(subject: _Subject) -> None:
    """Every trainable parameter of the router has finite gradients that are nonzero for some batch."""
    law = "a_gradient_reaches_every_parameter"
    layer = subject.layer(training=True)
    parameters = trainable(layer.router)
    moved = dict.fromkeys(parameters, False)
    for _ in range(4):
        found = gradients(subject.run(layer, _batch(3, 12)), list(parameters.values()))
        for name, gradient in zip(parameters, found, strict=True):
            if not gradient.isfinite().all():
                raise BrokenLaw(law, f"the gradient of {name} is not finite", "look for a division by 0 or a log of 0")
            moved[name] |= bool(gradient.count_nonzero())
    if dead := [name for name, has in moved.items() if not has]:
        raise BrokenLaw(
            law,
            f"no gradient reaches {', '.join(dead)}",
            "let the weights depend on it (top-1 weights that are normalised do not), or set requires_grad = False",
        )


def decisions_are_computed_in_fp32(subject: _Subject) -> None:
    """Logits and scores of a model in bf16 equal those computed in fp32, with and without autocast."""
    law, advice = "decisions_are_computed_in_fp32", "compute logits by moeify.routers.project(tokens.x, weight)"
    layer, batch = subject.layer().to(torch.bfloat16), _batch(2, 6)
    half = _Batch(batch.x.to(torch.bfloat16), batch.ids)
    exact = subject.route(deepcopy(layer).float(), _Batch(half.x.float(), batch.ids))
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            routing = subject.route(layer, half)
        for name in ("logits", "scores"):
            ours, theirs = getattr(routing, name), getattr(exact, name)
            if ours is None:
                continue
            if ours.dtype != torch.float32 or (error := difference(ours, theirs)) > 1e-4:
                seen = f"{name} are {ours.dtype}" if ours.dtype != torch.float32 else f"{name} are off by {error:.2g}"
                raise BrokenLaw(law, f"{seen}{' under autocast' if autocast else ''}", advice)


def half_precision_works(subject: _Subject) -> None:
    """A layer in bf16 has bf16 outputs and finite gradients."""
    law, layer, batch = "half_precision_works", subject.layer(training=True).to(torch.bfloat16), _batch(2, 6)
    y = subject.run(layer, _Batch(batch.x.to(torch.bfloat16), batch.ids))
    if y.dtype != torch.bfloat16:
        seen = f"the outputs of a layer in bf16 are in {y.dtype}"
        raise BrokenLaw(law, seen, "cast weights back where rows are combined, as Routing.combine does")
    if not all(g.isfinite().all() for g in gradients(y, list(layer.parameters()))):
        raise BrokenLaw(law, "a gradient of a layer in bf16 is not finite", "compute scores in fp32")


def evaluation_is_deterministic(subject: _Subject) -> None:
    """In evaluation mode, outputs do not depend on the state of the random generators."""
    layer, batch = subject.layer(), _batch(3, 5)
    outputs = []
    for seed in (1, 2):
        subject.context(layer, batch)
        torch.manual_seed(seed)
        outputs.append(layer(batch.x))
    if (error := difference(*outputs)) > 0:
        seen = f"two calls differ by {error:.2g}"
        raise BrokenLaw("evaluation_is_deterministic", seen, "draw noise only where self.training")


def copies_and_saved_states_decide_alike(subject: _Subject) -> None:
    """A deep copy, and a new router with the same state dict, have the same outputs."""
    law, layer, batch = "copies_and_saved_states_decide_alike", subject.layer(), _batch(3, 5)
    torch.manual_seed(1)
    restored = subject.layer()
    restored.load_state_dict(layer.state_dict())
    y = subject.run(layer, batch)
    for what, other in (("a deep copy", deepcopy(layer)), ("a router with the saved state", restored)):
        if (error := difference(subject.run(other, batch), y)) > 0:
            seen = f"outputs of {what} differ by {error:.2g}"
            raise BrokenLaw(
                law, seen, "keep what decisions need as parameters or buffers, and all that is drawn at first"
            )


def torch_compile_captures_the_router(subject: _Subject) -> None:
    """`torch.compile(fullgraph=True)` captures the router, and the compiled layer has the same outputs."""
    layer, batch = subject.layer(), _batch(3, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    y = subject.run(layer, batch)
    subject.context(layer, batch)
    if (error := difference(compiled(batch.x), y)) > 1e-5:
        seen = f"outputs of the compiled layer differ by {error:.2g}"
        raise BrokenLaw("torch_compile_captures_the_router", seen, "keep Python state out of forward")


LAWS = [
    a_decision_is_a_map_to_sorted_rows_and_back,
    padding_is_not_assigned,
    more_padding_changes_nothing,
    the_order_of_tokens_does_not_matter,
    sequences_do_not_see_each_other,
    causal_is_declared_truthfully,
    weights_sum_to_one_is_declared_truthfully,
    a_gradient_reaches_every_parameter,
    decisions_are_computed_in_fp32,
    half_precision_works,
    evaluation_is_deterministic,
    copies_and_saved_states_decide_alike,
]
