"""LoRA adapters beside every linear map of a frozen model: made, joined under a router, and measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import fmean

import torch
from common.documents import Blocks
from torch import Tensor, nn

from moeify import MoE, Recipe, record, sparsify
from moeify.context import extra_inputs
from moeify.find import linears
from moeify.routers import Lookup, Router, Uniform
from moeify.sparsify import frozen, lora
from moeify.train.freeze import freeze

RANK = 8


def adapted(base: nn.Module, num_experts: int, router: Callable[[int, int], Router] = Uniform) -> nn.Module:
    """The base with low-rank experts beside every linear map."""
    experts = partial(lora, rank=RANK)
    recipe = Recipe(where=linears(), num_experts=num_experts, router=router, experts=experts, shared=frozen)
    model = sparsify(copy.deepcopy(base), recipe, verbose=False)
    freeze(model, "base", verbose=False)
    return model.eval()


def layers(model: nn.Module) -> dict[str, MoE]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


Join = Callable[[list[Tensor]], Tensor]


@torch.no_grad()
def joined(base: nn.Module, adapters: list[nn.Module], join: Join, router: Callable[[int, int], Router]) -> nn.Module:
    """One model with the adapters of several: side by side, or averaged."""
    found = [layers(one) for one in adapters]
    names = list(found[0])
    joint = {
        (name, side): join([one[name].experts.get_parameter(side) for one in found])
        for name in names
        for side in ("lora_A", "lora_B")
    }
    model = adapted(base, len(joint[names[0], "lora_A"]), router)
    for name, layer in layers(model).items():
        for side in ("lora_A", "lora_B"):
            layer.experts.get_parameter(side).copy_(joint[name, side])
    return model


def mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(0)


@torch.no_grad()
def mean_inputs(model: nn.Module, blocks: Blocks) -> dict[str, Tensor]:
    """What every adapted map reads on average."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        return lambda _, given: found.update({name: given[0].flatten(0, -2).mean(0)})

    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers(model).items()]
    model(input_ids=blocks.ids)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def states(base: nn.Module, blocks: Blocks) -> Tensor:
    """The mean of the last hidden states of every document, (blocks, D)."""
    return base(input_ids=blocks.ids, output_hidden_states=True).hidden_states[-1].mean(1)


@torch.no_grad()
def held_out(model: nn.Module, blocks: Blocks, task: Tensor | None = None) -> float:
    """Nats per token that counts; `task` is the expert of each block, or of each token, for routers that look it up."""
    total, tokens = 0.0, 0
    for at in torch.arange(len(blocks)).split(32):
        part = blocks[at]
        counted = int((part.labels[:, 1:] >= 0).sum())
        with nullcontext() if task is None else extra_inputs(model, task=task[at]):
            total += counted * model(input_ids=part.ids, labels=part.labels).loss.item()
        tokens += counted
    return total / tokens


@torch.no_grad()
def own_share(model: nn.Module, own: list[Blocks]) -> float:
    """The share of tokens whose first choice is the adapter of their domain, mean over maps and domains."""
    shares = []
    for e, blocks in enumerate(own):
        with record(model) as decisions:
            model(input_ids=blocks.ids[:16])
        shares += [(routing.logits.argmax(-1) == e).float().mean().item() for routing in decisions.values()]
    return fmean(shares)


def looked_up(together: Callable[..., nn.Module], number: int) -> nn.Module:
    """A model that is told the adapter of each block or token."""
    model = together(torch.cat, partial(Lookup, key="task", size=number))
    for layer in layers(model).values():
        layer.router.table.copy_(torch.arange(number).unsqueeze(1))
    return model
