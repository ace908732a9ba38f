"""`DenseFFN`: a dense feed-forward network, assembled from the modules that hold its projections."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.experts.base import hold_activation
from moeify.kernels.stacked import Elementwise, Glu, Plain, gelu_tanh
from moeify.modes import fixed_randomness, in_evaluation

Candidate = TypeVar("Candidate")


class DenseFFN(nn.Module):
    """`down(activation(up(x)))`, holding the model's own linear layers.

    Args:
        ups: the up projection; or gate and up projections; or one projection with the outputs of both.
        down: the down projection.
        activation: between the projections.
        dropout: probability of the dropout between activation and down projection.
    """

    def __init__(self, ups: list[nn.Module], down: nn.Module, activation: Plain | Glu, dropout: float = 0.0) -> None:
        super().__init__()
        self.ups = nn.ModuleList(ups)
        self.down = down
        self.activation = activation
        hold_activation(self, activation)
        self.dropout = nn.Dropout(dropout)

    @property
    def up_weight(self) -> Float[Tensor, "M D"]:
        """The up projection's matrix, the gate's first."""
        return torch.cat([matrix(up) for up in self.ups])

    @property
    def up_bias(self) -> Float[Tensor, "M"] | None:
        """The up projection's bias, the gate's first."""
        biases = [up._parameters["bias"] for up in self.ups]
        return None if biases[0] is None else torch.cat([bias for bias in biases if bias is not None])

    @property
    def down_weight(self) -> Float[Tensor, "O H"]:
        """The down projection's matrix."""
        return matrix(self.down)

    @property
    def down_bias(self) -> Float[Tensor, "O"] | None:
        """The down projection's bias."""
        return self.down._parameters["bias"]

    @property
    def width(self) -> int:
        """D."""
        return matrix(self.ups[0]).shape[1]

    @property
    def hidden(self) -> int:
        """H."""
        return self.down_weight.shape[1]

    @property
    def width_out(self) -> int:
        """O."""
        return self.down_weight.shape[0]

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... O"]:
        """The dense network."""
        return self.down(self.dropout(self.activation(torch.cat([up(x) for up in self.ups], dim=-1))))


def narrowed(dense: DenseFFN, width: int) -> DenseFFN:
    """The network on parts of tokens: all hidden units, and their weights from and to the first `width` numbers."""
    ups: list[nn.Module] = [_linear(matrix(up)[:, :width], up._parameters["bias"]) for up in dense.ups]
    bias = dense.down_bias
    down = _linear(dense.down_weight[:width], None if bias is None else bias[:width])
    return DenseFFN(ups, down, dense.activation, dense.dropout.p)


def _linear(weight: Float[Tensor, "O D"], bias: Float[Tensor, "O"] | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: torch's Linear, or transformers' Conv1D, which stores the transpose."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def matrix(linear: nn.Module) -> Float[Tensor, "O D"]:
    """The matrix of a linear layer, outputs first."""
    weight = linear.get_parameter("weight")
    return weight.t() if _is_conv1d(linear) else weight


def widths(linear: nn.Module) -> tuple[int, int]:
    """The widths out and in of a linear layer, whose weight may be packed by quantisation."""
    if isinstance(linear, nn.Linear) or is_quantized(linear):
        return int(linear.out_features), int(linear.in_features)  # pyrefly: ignore[bad-argument-type]
    out, width = matrix(linear).shape
    return out, width


_FULL = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a linear layer by its widths whose weight is packed or of a type below 16 bits."""
    widths = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    weight = getattr(module, "weight", None)
    if not all(isinstance(width, int) for width in widths) or not isinstance(weight, torch.Tensor):
        return False
    return weight.dtype not in _FULL or tuple(weight.shape) != widths


def compute_dtype(model: nn.Module, module: nn.Module) -> torch.dtype:
    """The dtype that a module computes in: that of its weights or, if these are quantised, of the model's others."""
    of_quantized = {id(part.weight) for part in model.modules() if is_quantized(part)}
    parameters = [*module.parameters(), *model.parameters()]
    return next((p.dtype for p in parameters if p.dtype in _FULL and id(p) not in of_quantized), torch.float32)


_USUAL_ACTIVATIONS: tuple[Elementwise, ...] = (F.silu, F.gelu, gelu_tanh, F.relu, torch.tanh, torch.sigmoid)


def held_activations(module: nn.Module) -> Iterator[tuple[str, Elementwise]]:
    """The elementwise functions that a module holds, by attribute name; trainable parameters are scalars."""
    for name, part in [*module.named_children(), *vars(module).items()]:
        if name.startswith("_") or isinstance(part, nn.Dropout | nn.Identity | type) or not callable(part):
            continue
        if all(parameter.numel() == 1 for parameter in parameters_of(part)) and _is_elementwise(part):
            yield name, part


def parameters_of(function: Callable) -> list[nn.Parameter]:
    """The trainable parameters of an activation."""
    return list(function.parameters()) if isinstance(function, nn.Module) else []


def activations(module: nn.Module) -> list[Elementwise]:
    """Candidates for the activation of a module: those it holds, then the usual ones, which code may call."""
    return [act for _, act in held_activations(module)] + list(_USUAL_ACTIVATIONS)


def _is_elementwise(function: Callable) -> bool:
    try:
        return function(torch.zeros(2, 3)).shape == (2, 3)
    except MemoryError:  # no evidence about the model
        raise
    except Exception:  # any error means that it is not an activation
        return False


def candidates(module: nn.Module, linears: list[nn.Module]) -> Iterator[DenseFFN]:
    """Every way to read two or three linear layers as an FFN."""
    acts = activations(module)
    for *ups, down in itertools.permutations(linears):
        alike = len({(matrix(up).shape[1], up._parameters["bias"] is None) for up in ups}) == 1
        maps = sum(matrix(up).shape[0] for up in ups) / matrix(down).shape[1]
        for act in acts if alike and maps in (1, 2) else ():
            yield DenseFFN(ups, down, Plain(act) if maps == 1 else Glu(act))


def read(module: nn.Module, linears: list[nn.Module]) -> DenseFFN | None:
    """The `DenseFFN` that computes what a module computes, None if there is none.

    Without values to compare, on the meta device, it is the first of those with the most hidden units.
    """
    if linears[0].get_parameter("weight").is_meta:
        return max(candidates(module, linears), key=lambda ffn: ffn.hidden, default=None)
    return closest(candidates(module, linears), lambda ffn: output_error(module, ffn, ffn.width))


def closest(candidates: Iterable[Candidate], error: Callable[[Candidate], float]) -> Candidate | None:
    """The candidate of the least error, if that is no more than rounding; half precision cannot distinguish many."""
    best, least = None, _ROUNDING
    for candidate in candidates:
        if (found := error(candidate)) < least:
            best, least = candidate, found
        if found == 0:
            break
    return best


_ROUNDING = 64.0


@torch.no_grad()
def output_error(module: nn.Module, candidate: nn.Module, width: int) -> float:
    """How far apart two modules' outputs are in evaluation, in units of the last place; infinity if not comparable."""
    weight = next(module.parameters())
    if weight.dtype.itemsize < 2:  # quantised
        return float("inf")
    x = torch.randn(2, 3, width, dtype=weight.dtype, device=weight.device)
    with in_evaluation(module), in_evaluation(candidate):
        try:
            expected, actual = module(x), candidate(x)
        except (TypeError, ValueError, RuntimeError, AttributeError):  # it needs other arguments, so it is no plain FFN
            return torch.inf
    if not isinstance(expected, Tensor) or expected.shape != actual.shape:
        return torch.inf
    place = torch.finfo(x.dtype).eps * expected.abs().max()
    return ((expected - actual).abs().max() / place.clamp_min(torch.finfo(x.dtype).tiny)).item()


@torch.no_grad()
def accepts(module: nn.Module, width: int) -> bool:
    """Whether a module takes rows of this width."""
    weight = next(module.parameters())
    try:
        with in_evaluation(module), fixed_randomness(module):
            module(torch.randn(2, width, dtype=compute_dtype(module, module), device=weight.device))
    except MemoryError:  # no evidence about the model
        raise
    except Exception:  # any error means that it does not
        return False
    return True


def dropouts(module: nn.Module, ffn: DenseFFN) -> tuple[float, float]:
    """The probabilities of dropout before the down projection and after it, found by observing a module.

    Every dropout of the module drops everything for one call: if the down projection then reads zeros, dropout came
    before it; if it does not but the output is zero, dropout came after.
    """
    parts = [part for part in module.modules() if isinstance(part, nn.Dropout) and part.p > 0]
    if not parts or ffn.down_weight.is_meta:
        return max((part.p for part in parts), default=0.0), 0.0
    inner = outer = 0.0
    for part in parts:
        if _reads_zeros(module, ffn, part):
            inner = part.p
        else:
            outer = part.p
    return inner, outer


@torch.no_grad()
def _reads_zeros(module: nn.Module, ffn: DenseFFN, dropout: nn.Dropout) -> bool:
    read: list[Tensor] = []
    handles = [
        ffn.down.register_forward_pre_hook(lambda module, args: read.append(args[0])),
        dropout.register_forward_hook(lambda module, args, output: torch.zeros_like(output)),
    ]
    x = torch.randn(2, 3, ffn.width, dtype=ffn.down_weight.dtype, device=ffn.down_weight.device)
    try:
        with in_evaluation(module):
            module(x)
    finally:
        for handle in handles:
            handle.remove()
    return not read[0].any()
