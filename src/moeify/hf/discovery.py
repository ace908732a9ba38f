"""Find the mixture-of-experts blocks of transformers' models, by their class names or by their parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from moeify.hf.blocks import Block, InterfaceBlock, is_wrapper, unwrapped
from moeify.hf.families import family
from moeify.moe import MoE


def find_blocks(model: nn.Module) -> Iterator[Block]:
    """Every MoE block of a model that is transformers' own, with or without PEFT's wrappers around its modules."""
    ours = {id(part) for moe in model.modules() if isinstance(moe, MoE) for part in moe.modules()}
    for name, module in model.named_modules():
        if id(module) in ours or is_wrapper(module):
            continue
        if (build := family(module)) is not None:
            yield build(name, module)
        elif (block := _interface_block(name, module, ours)) is not None:
            yield block


def _stacked_experts(module: nn.Module) -> int:
    """The number of experts that a module of transformers stacks, zero experts included, 0 if it stacks none."""
    down = _parameter(module, "down_proj")
    up = next((up for name in ("gate_up_proj", "up_proj") if (up := _parameter(module, name)) is not None), None)
    return up.shape[0] if up is not None and down is not None and down.dim() == 3 else 0


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of the module itself, or what a parametrization makes of it."""
    return getattr(module, name) if is_parametrized(module, name) else module._parameters.get(name)


def _interface_block(name: str, module: nn.Module, ours: set[int]) -> InterfaceBlock | None:
    for experts in module.children():
        inside = unwrapped(experts)
        if id(experts) in ours or not (num_experts := _stacked_experts(inside)) or not _takes_choices(inside):
            continue
        others = [part for part in module.children() if part is not experts]
        router = next((part for part in others if _routes(part, num_experts)), None)
        shared = next((part for key, part in module.named_children() if "shared" in key and part is not router), None)
        return InterfaceBlock(
            name=name, module=module, router=router, experts=experts, shared=shared, num_experts=num_experts
        )
    return None


def _takes_choices(experts: nn.Module) -> bool:
    """Whether experts are called with tokens, indices and weights."""
    return len(inspect.signature(experts.forward).parameters) >= 3


def _routes(module: nn.Module, num_experts: int) -> bool:
    return any(p.dim() == 2 and p.shape[0] == num_experts for p in module.parameters())
