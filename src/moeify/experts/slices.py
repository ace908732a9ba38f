"""Train some experts of a stack alone: the slices that belong to them become parameters, the rest is frozen.

The experts of a layer are stacked in one tensor (E, ., .), which is trained whole or not at all. Here the slice of each
chosen expert is a parameter that shares memory with the stack, so only the chosen ones have gradients and optimizer
states, and nothing has to be copied back. A slice that is not contiguous there has memory of its own, from which the
stack is filled before it is read: torch's fused optimizers take every parameter to be contiguous, and would write to
other experts. The model keeps its tensors' names in state dicts and saved files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

Slice = Callable[[Tensor], Tensor]
_STACK = "original0"


class ExpertSlices(nn.Module):
    """A parametrization: the stack, whose gradient goes to the slices of the chosen experts.

    Args:
        slices: from the stack to a view of what belongs to one expert, one function for each chosen expert.
    """

    def __init__(self, slices: Sequence[Slice]) -> None:
        super().__init__()
        self.slices = tuple(slices)
        self.hooks: list[RemovableHandle] = []

    def right_inverse(self, stack: Tensor) -> tuple[Tensor, ...]:
        """The stack, and the slices: views of it where they are contiguous, copies where they are not."""
        return stack.detach(), *(of_expert(stack.detach()).contiguous() for of_expert in self.slices)

    def forward(self, stack: Tensor, *slices: Tensor) -> Tensor:
        """The stack itself, with the values that the slices have now."""
        self.fill(stack, slices)
        return _GradientOfSlices.apply(self.slices, stack, *slices)

    def fill(self, stack: Tensor, slices: Iterable[Tensor]) -> None:
        """Write copies into the stack; if its dtype or device has changed, make the others views of it again."""
        for part, of_expert in zip(slices, self.slices, strict=True):
            view = of_expert(stack.data)  # of data, as a forward pass before this one may still be in the graph
            if not view.is_contiguous():
                view.copy_(part.data)
            elif part.data_ptr() != view.data_ptr():
                part.data = view


class _GradientOfSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, of_experts: tuple[Slice, ...], stack: Tensor, *slices: Tensor) -> Tensor:
        ctx.of_experts = of_experts
        return stack.view_as(stack)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        return None, None, *(_copied(of_expert(gradient)) for of_expert in ctx.of_experts)


def _copied(gradient: Tensor) -> Tensor:
    return gradient.clone(memory_format=torch.contiguous_format)


def slice_parameter(module: nn.Module, name: str, slices: Sequence[Slice]) -> None:
    """Freeze a parameter of a module, and make slices of it parameters that are trained."""
    step = ExpertSlices(slices)
    parametrize.register_parametrization(module, name, step)
    for key, parameter in _originals(module, name).items():
        parameter.requires_grad_(key != _STACK)
    inside = f"parametrizations.{name}."

    def write_stack(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        parts = {key: state.pop(key) for key in [key for key in state if key.startswith(prefix + inside)]}
        stack, *slices = parts.values()
        step.fill(stack, slices)
        state[prefix + name] = stack

    def read_stack(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
        if prefix + name in state:
            parts = step.right_inverse(state.pop(prefix + name))
            state |= {f"{prefix}{inside}original{i}": part for i, part in enumerate(parts)}

    step.hooks = [
        module.register_state_dict_post_hook(write_stack), module.register_load_state_dict_pre_hook(read_stack)
    ]  # fmt: skip


def join_experts(model: nn.Module) -> None:
    """Make the stacks whole parameters again whose experts were trained apart; they are not trained afterwards.

    Saving does not need it. Call it before code that reads parameters by name, such as an exporter.
    """
    for module, name, step in list(_sliced(model)):
        stack, *slices = _originals(module, name).values()
        step.fill(stack, slices)
        for hook in step.hooks:
            hook.remove()
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
        delattr(module, name)
        module.register_parameter(name, stack)


def slices_of(model: nn.Module) -> set[Tensor]:
    """The parameters that are slices of others."""
    originals = [_originals(module, name) for module, name, _ in _sliced(model)]
    return {parameter for parts in originals for key, parameter in parts.items() if key != _STACK}


def _originals(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The stack, as `original0`, and its slices."""
    return dict(module.get_submodule(f"parametrizations.{name}").named_parameters(recurse=False))


def _sliced(model: nn.Module) -> Iterator[tuple[nn.Module, str, ExpertSlices]]:
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name, steps in module.get_submodule("parametrizations").named_children():
                step = next(steps.children())
                if isinstance(step, ExpertSlices):
                    yield module, name, step
