"""Laws: functions that check an invariant and raise `BrokenLaw`; with helpers to compare outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from moeify.registry import suggest

Subject = TypeVar("Subject")


class BrokenLaw(AssertionError):
    """A router, experts or a backend violate a law; the message has the law, the observation and advice.

    Attributes:
        law: the name of the law.
    """

    def __init__(self, law: str, seen: str, advice: str) -> None:
        super().__init__(f"{law.replace('_', ' ')}: {seen}; {advice}")
        self.law = law


def check_laws(laws: Sequence[Callable[[Subject], None]], subject: Subject, without: Collection[str]) -> None:
    """Check laws in order, each with seed 0; the states of the random generators are restored.

    Raises:
        BrokenLaw: the first law that is violated.
        ValueError: a name in `without` that no law has.
    """
    names = [law.__name__ for law in laws]
    for name in without:
        if name not in names:
            raise ValueError(f"no law is called {name!r}; {suggest(name, names)}")
    for law in laws:
        if law.__name__ in without:
            continue
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(0)
            try:
                law(subject)
            except BrokenLaw:
                raise
            except Exception as error:
                seen = f"{type(error).__name__}: {error}"
                raise BrokenLaw(law.__name__, seen, "nothing may be raised here; see the traceback above") from error


def difference(a: Tensor, b: Tensor) -> float:
    """Maximum |a - b| over max(1, maximum |b|); infinite for NaN or different shapes."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    error = ((a - b).abs().max() / b.abs().max().clamp_min(1)).item()
    return error if error == error else float("inf")


def gradients(y: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a fixed random projection of y to a scalar; zeros for leaves that it does not depend on."""
    if not y.requires_grad or not leaves:
        return [torch.zeros_like(leaf) for leaf in leaves]
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y.device)
    found = torch.autograd.grad((y.double() * direction).sum(), leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that require gradients, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


@contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Fill the memory of `torch.empty` with NaN, so that reads of uninitialised memory become visible."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
