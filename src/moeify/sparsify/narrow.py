"""Parts of recipes for models with several tasks: narrow experts, and the level of PLE that reads several streams."""

from __future__ import annotations

from torch import nn

from moeify.experts.base import Experts
from moeify.experts.blocks import Each
from moeify.experts.of_inputs import OfInputs
from moeify.registry import register
from moeify.routers.extraction import Extraction


@register("experts", "narrow")
def narrow(dense: nn.Module, num_experts: int) -> Experts:
    """Experts of the architecture of a stack of two linear layers, each with 1 / E of its hidden units.

    All together they cost what the dense module costs.

    Args:
        dense: a `Sequential` of a linear layer, an activation, a linear layer and, if it has one, another activation.
        num_experts: E; must divide the hidden width.

    Raises:
        ValueError: another module, or a hidden width that E does not divide.
    """
    parts = list(dense.children())
    linears = [part for part in parts if isinstance(part, nn.Linear)]
    if not isinstance(dense, nn.Sequential) or len(linears) != 2 or len(parts) > 4:
        raise ValueError(f"narrow experts need a Sequential of two linear layers, and this is a {type(dense).__name__}")
    up, down = linears
    if up.out_features % num_experts:
        raise ValueError(f"{up.out_features} hidden units cannot be divided among {num_experts} experts")
    hidden = up.out_features // num_experts

    def made(part: nn.Module) -> nn.Module:
        if part is up:
            return nn.Linear(up.in_features, hidden, bias=up.bias is not None)
        return nn.Linear(hidden, down.out_features, bias=down.bias is not None) if part is down else part

    return Each(nn.Sequential(*(made(part) for part in parts)) for _ in range(num_experts))


@register("experts", "narrow_of_streams")
def narrow_of_streams(dense: nn.Module, num_experts: int, *, tasks: int, private: int = 1) -> Experts:
    """`narrow` experts that read the streams of a level of PLE: of its task, or of the shared experts, the last one.

    Args:
        dense: as of `narrow`.
        num_experts: E.
        tasks: n.
        private: experts of each task, which come first.
    """
    reads = [task for task in range(tasks) for _ in range(private)]
    return OfInputs(narrow(dense, num_experts), reads + [tasks] * (num_experts - len(reads)), tasks + 1)


@register("router", "extraction_of_streams")
def extraction_of_streams(width: int, num_experts: int, *, tasks: int, private: int = 1) -> Extraction:
    """An `Extraction` for a layer whose dense module reads one stream, and which reads one per task and a shared one.

    Every level has a shared gate; the output of that of the last level is not used.

    Args:
        width: D of one stream.
        num_experts: E.
        tasks: n.
        private: experts of each task.
    """
    return Extraction((tasks + 1) * width, num_experts, tasks=tasks, private=private)
