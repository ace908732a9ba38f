"""The experts interface of transformers: compute its experts by moeify, and layers of moeify by its functions.

Its functions map `(experts, tokens, index, weights)` to tokens, whatever the model. Ours can be put in their place, and
theirs can run moeify's layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moeify import backends
from moeify.backends import Backend, find_backend, register_backend
from moeify.backends.base import needs_all_choices, needs_dtype, needs_no_autocast, needs_weights, sparse
from moeify.experts import FFN, Experts
from moeify.kernels import grouped_linear
from moeify.kernels.stacked import Activation, ClampedGlu, Glu, Plain, Stacked
from moeify.routing import Assignment, Routing, assign

Model = TypeVar("Model", bound=nn.Module)


def use_moeify_experts(model: Model) -> Model:
    """Compute the experts of a model of transformers by moeify; in place, parameters and checkpoints stay as they are.

    `from_pretrained(..., experts_implementation="moeify")` does the same once `moeify` has been imported.

    Raises:
        ValueError: no layer of the model computes its experts through transformers' interface.
    """
    if not any(_follows_interface(module) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no experts behind transformers' interface, so there is nothing to compute by "
            "moeify; make a dense model sparse with moeify.sparsify"
        )
    model.set_experts_implementation("moeify")  # pyrefly: ignore[not-callable]
    return model


def _follows_interface(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("_apply_gate", "is_transposed", "has_bias", "has_gate"))


def moeify_experts(
    experts: nn.Module,
    hidden_states: Float[Tensor, "T D"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
) -> Float[Tensor, "T D"]:
    """The outputs of `experts` of transformers; an index of E or more means no expert, as under expert parallelism.

    Rows without an expert are removed, so their number is read: one synchronisation with an accelerator.
    """
    ours = HfExperts(experts)
    routing = rows_of_choices(top_k_index, top_k_weights, ours.num_experts)
    return backends.run("auto", hidden_states, routing, ours).to(hidden_states.dtype)


def rows_of_choices(
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
    num_experts: int,
    positions: Int[Tensor, "real"] | None = None,
) -> Assignment:
    """The rows of what tokens chose, sorted by expert; an index of E or more means no expert.

    Args:
        top_k_index: the chosen experts of all tokens.
        top_k_weights: their weights.
        num_experts: E.
        positions: of the tokens that count, all if not given.
    """
    tokens = len(top_k_index)
    if positions is not None:
        top_k_index, top_k_weights = top_k_index[positions], top_k_weights[positions]
    index = top_k_index.clamp(max=num_experts)
    return _without_last(assign(index, top_k_weights, num_experts + 1, shape=(tokens,), positions=positions))


def _without_last(routing: Assignment) -> Assignment:
    """The decision without the rows of the last expert, which are at the end."""
    counts = routing.counts[:-1]
    return replace(routing.only(slice(int(counts.sum())), counts=counts), before_limit=None)


class HfExperts(Experts):
    """The experts of a model of transformers, with the interface of moeify's experts.

    Args:
        experts: experts behind transformers' interface: `gate_up_proj` or `up_proj`, and `down_proj`, stacked.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.num_experts: int = experts.num_experts  # pyrefly: ignore[bad-assignment]

    def called_modules(self) -> list[nn.Module]:
        """The module itself: the experts of transformers call it in their forward pass, after their hooks."""
        return [self]

    @property
    def stacked(self) -> Stacked | None:
        """Its weights, if all that its experts compute is `down(activation(up(row)))` with an activation of moeify."""
        n: Any = self.experts
        activation = _activation(n, getattr(n, "act_fn", F.silu))
        if activation is None or getattr(n, "has_post_expert_norm", False):
            return None
        (up, up_bias), (down, down_bias) = (
            self._projection("gate_up_proj" if n.has_gate else "up_proj"),
            self._projection("down_proj"),
        )
        return Stacked(up, up_bias, down, down_bias, activation)

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """Up, gate or activation, down, and the norm that some families put behind."""
        n: Any = self.experts
        if n.has_gate:
            hidden = n._apply_gate(self._linear("gate_up_proj", rows, counts))
        else:
            hidden = n.act_fn(self._linear("up_proj", rows, counts))
        outputs = self._linear("down_proj", hidden, counts)
        return n.post_expert_norm(outputs) if getattr(n, "has_post_expert_norm", False) else outputs

    def _linear(self, name: str, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        weight, bias = self._projection(name)
        return grouped_linear(rows, weight, counts, bias)

    def _projection(self, name: str) -> tuple[Float[Tensor, "E O D"], Float[Tensor, "E O"] | None]:
        n: Any = self.experts
        weight = getattr(n, name)
        return weight.transpose(1, 2) if n.is_transposed else weight, getattr(n, f"{name}_bias") if n.has_bias else None


_ACTIVATIONS: WeakKeyDictionary[nn.Module, tuple[Any, Activation | None]] = WeakKeyDictionary()
"""Of experts of transformers: the function that they had, and the activation that it was recognised as."""


@torch.compiler.assume_constant_result
def _activation(experts: Any, act: Any) -> Activation | None:
    """The activation of transformers' experts, recognised by its values; None if moeify does not have it."""
    known, activation = _ACTIVATIONS.get(experts, (None, None))
    if known is not act:
        theirs, ours = (experts._apply_gate, [ClampedGlu(), Glu(act)]) if experts.has_gate else (act, [Plain(act)])
        x = torch.linspace(-12, 12, 96, dtype=torch.float64).view(4, 24)
        with torch.no_grad():
            activation = next((each for each in ours if torch.allclose(theirs(x), each(x))), None)
        _ACTIVATIONS[experts] = act, activation
    return activation


def use_transformers_backends() -> list[str]:
    """Register transformers' experts functions as backends of moeify's layers, and return their names.

    `transformers/grouped_mm` is torch's grouped matrix product; `transformers/batched_mm` gathers a copy of the weights
    for every row, which suits decoding and little else. `auto` takes neither.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    for name in ("grouped_mm", "batched_mm"):
        refuse = _grouped_mm_cannot if name == "grouped_mm" else _theirs_cannot
        theirs = Backend(partial(_run_theirs, ALL_EXPERTS_FUNCTIONS[name]), refuse, chosen=lambda *call: False)
        register_backend(f"transformers/{name}", theirs)
    return ["transformers/grouped_mm", "transformers/batched_mm"]


def _run_theirs(theirs: Callable[..., Tensor], x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> Tensor:
    choices = sparse(routing).choices
    assert choices is not None
    assert isinstance(experts, FFN)
    tokens = x.reshape(-1, x.shape[-1])
    return theirs(_as_theirs(experts), tokens, choices.indices, choices.weights).view(x.shape)


def _as_theirs(ffn: FFN) -> SimpleNamespace:
    """What transformers' experts functions read from experts."""
    gated = ffn.activation.projections == 2
    return SimpleNamespace(
        **ffn._parameters,
        num_experts=ffn.num_experts,
        has_gate=gated,
        has_bias=ffn.up[1] is not None,
        has_post_expert_norm=False,
        is_transposed=False,
        is_concatenated=isinstance(ffn.activation, Glu),
        _is_expert_parallel=False,
        _apply_gate=ffn.activation,
        act_fn=ffn.activation,
    )


def _theirs_cannot(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> str | None:
    if reason := find_backend("gather").refuse(x, routing, experts) or needs_all_choices(routing):
        return reason
    if not isinstance(experts, FFN):
        return f"it needs the stacked weights of an FFN, and the experts are {type(experts).__name__}"
    if experts.width_out != experts.width:
        return f"it needs outputs as wide as tokens, and these experts map {experts.width} to {experts.width_out}"
    if experts.training and experts.dropout.p > 0:
        return "it does not support expert dropout"
    return (
        needs_weights(x, experts, experts.parameters())
        or needs_no_autocast(x)
        or needs_dtype(x, (x.dtype,), [experts.up[0]])
    )


def _grouped_mm_cannot(x: Float[Tensor, "... D"], routing: Routing, experts: Experts) -> str | None:
    if reason := _theirs_cannot(x, routing, experts):
        return reason
    assert isinstance(experts, FFN)
    sizes = (experts.width, experts.activation.projections * experts.hidden, experts.hidden)
    odd = [size for size in sizes if size * x.element_size() % 16]
    return f"its rows must be multiples of 16 bytes, and {odd[0]} {x.dtype} values are not" if odd else None
