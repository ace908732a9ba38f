"""The registry of backends, in the order in which `auto` considers them, and the selection of one for a call."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from moeify import env
from moeify.backends import cpp, latent, low_rank, onednn, peers, plain, triton
from moeify.backends.base import Backend
from moeify.experts.base import Experts
from moeify.experts.wrapped import as_experts
from moeify.registry import suggest
from moeify.routing import Routing


def _by_auto(x: Tensor, routing: Routing, experts: Experts) -> Tensor:
    return run("auto", x, routing, experts)


_ORDER: list[tuple[str, Backend]] = [
    ("precomputed", Backend(plain.combine_outputs, plain.cannot_combine_outputs, chosen=lambda *call: True)),
    ("decode", Backend(triton.decode, triton.cannot_decode, triton.decode_chosen)),
    ("triton", Backend(triton.run, triton.cannot, triton.chosen)),
    ("latent", Backend(partial(latent.run, inside=_by_auto), latent.refuse, chosen=lambda *call: True)),
    ("low_rank", Backend(low_rank.run, low_rank.refuse, low_rank.chosen)),
    ("cpp", Backend(cpp.run, cpp.refuse, cpp.chosen)),
    ("onednn", Backend(onednn.run, onednn.refuse, chosen=lambda x, *_: x.is_cpu)),
    ("recompute", Backend(partial(onednn.run, keep=False), onednn.refuse, chosen=lambda *call: False)),
    ("gather", Backend(plain.gather, plain.cannot_gather, chosen=lambda x, *_: x.is_cuda)),
    ("liger", Backend(peers.liger, peers.cannot_liger, chosen=lambda *call: False)),
    ("sonicmoe", Backend(peers.sonicmoe, peers.cannot_sonicmoe, chosen=lambda *call: False)),
    ("compose", Backend(plain.compose, refuse=lambda *call: None, chosen=lambda *call: True)),
]


def backend_names() -> list[str]:
    """The names of all backends, in the order in which `auto` considers them; `compose` supports every call."""
    return [name for name, _ in _ORDER]


def find_backend(name: str) -> Backend:
    """The backend registered under a name.

    Raises:
        ValueError: no backend has this name.
    """
    for known, backend in _ORDER:
        if known == name:
            return backend
    raise ValueError(f"no backend is called {name!r}; known are: auto, {', '.join(backend_names())}")


def register_backend(name: str, backend: Backend, *, before: str = "compose") -> None:
    """Register a backend under a name, replacing an existing one of the same name.

    Args:
        name: the name for `MoE(backend=...)`.
        backend: the backend.
        before: the backend before which `auto` considers the new one.

    Raises:
        ValueError: the name is `auto` or `compose`, or no backend is called `before`.
    """
    if name in ("auto", "compose"):
        raise ValueError(f"a backend cannot be called {name!r}, which moeify keeps for itself; choose another name")
    others = [(known, other) for known, other in _ORDER if known != name]
    names = [known for known, _ in others]
    if before not in names:
        raise ValueError(f"there is no backend {before!r} to put {name!r} before; {suggest(before, names)}")
    others.insert(names.index(before), (name, backend))
    _ORDER[:] = others


def run(name: str, x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Tensor:
    """Run a layer with the named backend; `auto` uses the first one that is `chosen` for the call and supports it.

    With `MOEIFY_CHECK=1` in the environment every result is compared with `compose`.

    Raises:
        ValueError: an unknown name, or a named backend that does not support this call.
        RuntimeError: with `MOEIFY_CHECK=1`, the output differs from that of `compose`.
    """
    experts = as_experts(experts)
    if name == "auto":
        name = choose(x, routing, experts)
    elif reason := find_backend(name).refuse(x, routing, experts):
        raise ValueError(f"backend {name!r} cannot run this layer: {reason}; use backend='auto'")
    backend = find_backend(name)
    if not env.CHECK.is_on or backend.run is plain.compose:
        return backend.run(x, routing, experts)
    with torch.no_grad(), torch.random.fork_rng():  # the same dropout mask in both runs
        reference = plain.compose(x, routing, experts)
    y = backend.run(x, routing, experts)
    _must_agree(name, y, reference)
    return y


def choose(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> str:
    """The name of the backend that `auto` uses: `compose` for `torch.export`, whose graphs have ordinary operators."""
    if torch.compiler.is_exporting():
        return "compose"
    call = (x, routing, experts)
    return next(name for name, backend in _ORDER if backend.chosen(*call) and backend.refuse(*call) is None)


def _must_agree(name: str, y: Tensor, reference: Tensor) -> None:
    tolerance = 64 * torch.finfo(y.dtype).eps * max(1.0, reference.abs().max().item())
    difference = (y.float() - reference.float()).abs().max().item()
    if not difference <= tolerance:
        raise RuntimeError(
            f"backend {name!r} differs from the definition by {difference:.3g} (allowed {tolerance:.3g}); "
            "use backend='compose' and report this"
        )
