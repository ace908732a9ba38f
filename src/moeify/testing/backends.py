"""The laws (invariants) of backends, and `check_backend`, which checks a custom backend."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from moeify.backends import compose, find_backend
from moeify.capacity import limit
from moeify.experts import FFN, Blocks, Experts, Identity, LoRA, Plain, Zero
from moeify.routing import Mixture, Routing, assign
from moeify.testing.laws import BrokenLaw, check_laws, difference, gradients, uninitialised_memory_is_nan

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 6e-2}
_EXPERTS = 4


def check_backend(
    name: str,
    *,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    width: int = 64,
    hidden: int = 32,
    without: Collection[str] = (),
) -> None:
    """Check that a backend satisfies the laws of backends, for various routing decisions and types of experts.

    Args:
        name: the name under which it was registered by `register_backend`.
        device: the device of tokens and experts.
        dtypes: dtypes of tokens and weights.
        width: dimension of the tokens.
        hidden: hidden dimension of the experts.
        without: names of laws that the backend violates by design.

    Raises:
        BrokenLaw: the first law that is violated; an AssertionError.
        ValueError: no backend of that name; a name in `without` that no law has.
    """
    find_backend(name)
    check_laws(LAWS, _Subject(name, torch.device(device), tuple(dtypes), width, hidden), without)


@dataclass(frozen=True)
class _Case:
    """One call of a backend.

    Attributes:
        name: describes decision and experts, for error messages.
        x: the tokens.
        weights: the weights of the routing decision, which may require a gradient.
        routing: the routing decision.
        experts: the experts.
    """

    name: str
    x: Tensor
    weights: Tensor
    routing: Routing
    experts: Experts

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors whose gradients are checked: tokens, weights of the routing decision, parameters."""
        return [self.x, self.weights, *(p for p in self.experts.parameters() if p.requires_grad)]


@dataclass(frozen=True)
class _Subject:
    """A backend under test."""

    name: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    width: int
    hidden: int

    def refuse(self, case: _Case) -> str | None:
        """The reason why the backend does not support a call, None if it does."""
        return find_backend(self.name).refuse(case.x, case.routing, case.experts)

    def run(self, case: _Case) -> Tensor:
        """The output of the backend."""
        return find_backend(self.name).run(case.x, case.routing, case.experts)

    def cases(self, dtype: torch.dtype, *, gradient: bool = True) -> Iterator[_Case]:
        """All combinations of routing decisions, numbers of tokens and types of experts."""
        for name, make in self.experts().items():
            for tokens in (1, 7, 48):
                for decision in ("all rows", "one expert", "padded", "limited", "uneven", "gates", "mixture"):
                    experts = make().to(self.device, dtype).requires_grad_(gradient)
                    weights, routing = _decide(decision, tokens, self.device, gradient)
                    x = torch.randn(self.width, routing.shape[0], device=self.device, dtype=dtype)
                    x = (x.t().contiguous() if tokens > 1 else x.t()).requires_grad_(gradient)
                    yield _Case(f"{tokens} tokens, {decision}, {name}, {dtype}", x, weights, routing, experts)

    def experts(self) -> dict[str, partial[Experts]]:
        """Factories of experts by name."""
        sizes = (_EXPERTS, self.width, self.hidden)
        return {
            "gated experts": partial(FFN, *sizes),
            "experts with biases": partial(FFN, *sizes, activation=Plain(nn.functional.gelu), bias=True),
            "low-rank experts": partial(_lora, self.width),
            "experts of several kinds": partial(_blocks, self.width),
        }


def _lora(width: int) -> Experts:
    experts = LoRA(_EXPERTS, width, rank=3)
    nn.init.normal_(experts.lora_B, std=0.1)
    return experts


def _blocks(width: int) -> Experts:
    return Blocks([FFN(2, width, 12), Identity(), Zero()])


def _decide(decision: str, tokens: int, device: torch.device, gradient: bool) -> tuple[Tensor, Routing]:
    """A random routing decision of the given type, and its weights; expert 1 has no rows except in a mixture."""
    if decision == "mixture":
        weights = torch.rand(tokens, 2 * _EXPERTS, device=device, requires_grad=gradient)
        counts = torch.full((_EXPERTS,), 2, device=device)
        into = weights.detach().softmax(0)
        return weights, Mixture(counts=counts, into=into, out_of=weights.softmax(1), shape=(tokens,))
    k = 1 if decision == "one expert" else 2
    score = torch.rand(tokens, _EXPERTS, device=device)
    score[:, 1] = -1.0
    indices = score.topk(k).indices
    gates = (2,) if decision == "gates" else ()
    weights = torch.rand(tokens, k, *gates, device=device, requires_grad=gradient)
    if decision == "padded":
        positions = torch.arange(tokens, device=device) * 2
        routing = assign(indices, weights, _EXPERTS, shape=(2 * tokens,), positions=positions)
        return weights, routing
    routing = assign(indices, weights, _EXPERTS)
    if decision == "limited":
        return weights, limit(routing, max(1, tokens // 4))
    if decision == "uneven":
        return weights, routing.only(routing.source % 2 == 0) if tokens > 1 else routing
    return weights, routing


def it_serves_a_call_or_says_why_not(subject: _Subject) -> None:
    """`refuse` returns None or a reason as text, does not raise, and does not reject every call."""
    law, served, reason = "it_serves_a_call_or_says_why_not", 0, None
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient):
            for dtype in subject.dtypes:
                for case in subject.cases(dtype, gradient=gradient):
                    reason = subject.refuse(case)
                    if reason is not None and not (isinstance(reason, str) and reason.strip()):
                        seen = f"refuse returned {reason!r} for {case.name}"
                        raise BrokenLaw(law, seen, "return None, or the reason in words")
                    served += reason is None
    if not served:
        seen = f"it refuses every call on {subject.device}; the last reason was: {reason}"
        raise BrokenLaw(law, seen, "check it on a device, in dtypes and at widths that it is made for")


def outputs_and_gradients_are_those_of_compose(subject: _Subject) -> None:
    """Calls that are not refused have the outputs of `compose`, and its gradients if gradients are enabled."""
    for gradient in (False, True):
        for dtype in subject.dtypes:
            for case in subject.cases(dtype, gradient=gradient):
                with torch.set_grad_enabled(gradient), uninitialised_memory_is_nan():
                    if subject.refuse(case) is None:
                        _must_agree(subject, case, gradient, _TOLERANCE.get(dtype, 6e-2))


def _must_agree(subject: _Subject, case: _Case, gradient: bool, tolerance: float) -> None:
    law = "outputs_and_gradients_are_those_of_compose"
    x, experts = case.x.detach().double().requires_grad_(gradient), deepcopy(case.experts).double()
    before = case.x.detach().clone()
    fast, slow = subject.run(case), compose(x, case.routing, experts)
    if not torch.equal(before, case.x.detach()):
        raise BrokenLaw(law, f"it writes into the tokens ({case.name})", "leave inputs as they are")
    if fast.dtype != case.x.dtype or (error := difference(fast, slow)) > tolerance:
        found = f"outputs are in {fast.dtype}" if fast.dtype != case.x.dtype else f"outputs differ by {error:.2g}"
        advice = "refuse such calls, or compute what moeify.backends.compose does"
        raise BrokenLaw(law, f"{found} ({case.name}{_nan(fast)})", advice)
    if not gradient:
        return
    exact = _Case(case.name, x, case.weights, case.routing, experts)
    for i, (a, b) in enumerate(zip(gradients(fast, case.leaves), gradients(slow, exact.leaves), strict=True)):
        if (error := difference(a, b)) > tolerance:
            what = ("tokens", "weights of the decision")[i] if i < 2 else f"expert parameter {i - 2}"
            seen = f"gradients of the {what} differ by {error:.2g} ({case.name}{_nan(a)})"
            raise BrokenLaw(law, seen, "derive them from the definition, or refuse calls that need a gradient")


def _nan(tensor: Tensor) -> str:
    return ", with NaN from memory that was never written" if tensor.isnan().any() else ""


def hooks_on_experts_run(subject: _Subject) -> None:
    """Calls that are not refused run the forward hooks of the experts."""
    for dtype in subject.dtypes:
        with torch.no_grad(), uninitialised_memory_is_nan():
            for case in subject.cases(dtype, gradient=False):
                case.experts.register_forward_hook(lambda module, args, output: 2 * output)
                if subject.refuse(case) is not None:
                    continue
                if difference(subject.run(case), compose(case.x, case.routing, case.experts)) > _TOLERANCE.get(
                    dtype, 6e-2
                ):
                    seen = f"a forward hook on the experts was passed by ({case.name})"
                    raise BrokenLaw("hooks_on_experts_run", seen, "call the experts, or refuse by needs_weights")


LAWS = [it_serves_a_call_or_says_why_not, outputs_and_gradients_are_those_of_compose, hooks_on_experts_run]
