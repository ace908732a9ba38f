"""Which backend runs a layer."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from moeify import env
from moeify.backends import cpp, onednn, peers, plain, triton
from moeify.backends.base import Backend
from moeify.experts.base import Experts
from moeify.routing import Routing

BACKENDS: dict[str, Backend] = {
    "answered": Backend(plain.answered, plain.unanswered, chosen=lambda *call: True),
    "decode": Backend(triton.decode, triton.cannot_decode, triton.decode_chosen),
    "triton": Backend(triton.run, triton.cannot, triton.chosen),
    "cpp": Backend(cpp.run, cpp.refuse, cpp.chosen),
    "onednn": Backend(onednn.run, onednn.refuse, chosen=lambda x, *_: x.is_cpu),
    "recompute": Backend(partial(onednn.run, keep=False), onednn.refuse, chosen=lambda *call: False),
    "gather": Backend(plain.gather, plain.cannot_gather, chosen=lambda x, *_: x.is_cuda),
    "liger": Backend(peers.liger, peers.cannot_liger, chosen=lambda *call: False),
    "sonicmoe": Backend(peers.sonicmoe, peers.cannot_sonicmoe, chosen=lambda *call: False),
    "compose": Backend(plain.compose, refuse=lambda *call: None, chosen=lambda *call: True),
}
"""Every backend by name; `auto` takes the first that is made for a call and does not refuse it."""


def run(name: str, x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Tensor:
    """Run a layer by the named backend; `auto` takes the first that is made for such inputs and does not refuse.

    With `MOEIFY_CHECK=1` in the environment every result is compared with `compose`.

    Raises:
        ValueError: an unknown name, or a named backend that cannot serve this call.
    """
    if name == "auto":
        name = choose(x, routing, experts)
    elif name not in BACKENDS:
        raise ValueError(f"no backend is called {name!r}; known are: auto, {', '.join(BACKENDS)}")
    elif reason := BACKENDS[name].refuse(x, routing, experts):
        raise ValueError(f"backend {name!r} cannot run this layer: {reason}; use backend='auto'")
    backend = BACKENDS[name]
    if not env.CHECK.is_on or backend.run is plain.compose:
        return backend.run(x, routing, experts)
    with torch.no_grad(), torch.random.fork_rng():  # dropout falls on the same hidden units both times
        reference = plain.compose(x, routing, experts)
    y = backend.run(x, routing, experts)
    _must_agree(name, y, reference)
    return y


def choose(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> str:
    """The backend that `auto` takes."""
    call = (x, routing, experts)
    return next(name for name, b in BACKENDS.items() if b.chosen(*call) and b.refuse(*call) is None)


def _must_agree(name: str, y: Tensor, reference: Tensor) -> None:
    tolerance = 64 * torch.finfo(y.dtype).eps * max(1.0, reference.abs().max().item())
    difference = (y.float() - reference.float()).abs().max().item()
    if not difference <= tolerance:
        raise RuntimeError(
            f"backend {name!r} differs from the definition by {difference:.3g} (allowed {tolerance:.3g}); "
            "use backend='compose' and report this"
        )
