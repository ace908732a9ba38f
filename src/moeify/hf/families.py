"""MoE blocks of transformers that bypass its experts interface (Switch, NLLB, Llama 4, JetMoE, ...), by family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moeify.context import recomputing
from moeify.hf.blocks import Block, InterfaceBlock, Observer, unwrapped
from moeify.hf.decisions import Chosen
from moeify.routers.topk import sigmoid, softmax

Build = Callable[[str, nn.Module], Block]


def family(module: nn.Module) -> Build | None:
    """The `Block` class for a module, by the name of its class or a base class; None for other modules."""
    return next((_FAMILIES[c.__name__] for c in type(module).__mro__ if c.__name__ in _FAMILIES), None)


@dataclass(frozen=True, kw_only=True)
class SwitchBlock(InterfaceBlock):
    """Switch Transformers: experts are modules, called with a one-hot mask (N, 1, E) after capacity drops."""

    def _logits(self, output: Any) -> Tensor:
        return output[2]

    def _chosen(self, arguments: tuple, router_output: Tensor | None) -> Chosen:
        _, mask, weights = arguments
        kept = mask.view(len(mask), -1).sum(-1, keepdim=True) > 0
        index = mask.view(len(mask), -1).argmax(-1, keepdim=True)
        if router_output is not None:
            index = torch.where(kept, index, router_output.view(len(mask), -1).argmax(-1, keepdim=True))
        return Chosen(index=index, weights=weights, router_output=router_output, kept=kept, score=softmax)

    @property
    def experts_per_token(self) -> int:
        """1 expert per token."""
        return 1

    def run_unrouted(self, real: Callable[[int], Int[Tensor, "T"] | None]) -> list[RemovableHandle]:
        """Call every expert with the tokens that are not in its column of the mask."""
        return [self.experts.register_forward_hook(_run_unrouted(real, self._read))]

    def _read(self, mask: Tensor) -> Tensor:
        return mask.view(len(mask), -1) > 0


@dataclass(frozen=True, kw_only=True)
class NllbBlock(InterfaceBlock):
    """NLLB-MoE as transformers computes it, which differs from how it was trained.

    Its experts are called with the one-hot mask (N, E) of the first choices, and read it as expert numbers: for every
    token expert 1 runs once and expert 0 runs E - 1 times, with the router's E weights. These rows are the decision.
    """

    def _logits(self, output: Any) -> Tensor:
        return output[2]

    def _chosen(self, arguments: tuple, router_output: Tensor | None) -> Chosen:
        _, mask, weights = arguments
        experts: Any = unwrapped(self.experts)
        if not experts.training:
            weights = weights * (1 - experts.moe_token_dropout)
        return Chosen(index=mask.long(), weights=weights, router_output=router_output, score=softmax)

    @property
    def experts_per_token(self) -> int:
        """E rows for every token."""
        return self.num_experts

    @property
    def remark(self) -> str:
        """Why every token has E rows."""
        return (
            "transformers reads the mask of NLLB-MoE's first choices as expert numbers: every token runs expert 1 once "
            "and expert 0 for all its other rows, and the other experts compute nothing."
        )

    def run_unrouted(self, real: Callable[[int], Int[Tensor, "T"] | None]) -> list[RemovableHandle]:
        """Call every expert with the tokens that do not reach it."""
        return [self.experts.register_forward_hook(_run_unrouted(real, self._read))]

    def _read(self, mask: Tensor) -> Tensor:
        read = torch.zeros_like(mask, dtype=torch.bool)
        return read.scatter(1, mask.long(), torch.ones_like(read))


@dataclass(frozen=True, kw_only=True)
class RouterBlock(Block):
    """A block whose router output contains the whole decision.

    Attributes:
        read: gets the choices of the block from its module and the router's output.
    """

    read: Callable[[nn.Module, Any], Chosen]

    def observe(self, observer: Observer, *, repeated: bool = False) -> list[RemovableHandle]:
        """Observe the output of the router."""
        assert self.router is not None

        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if repeated or not recomputing():
                observer(self.read(self.module, output))

        return [self.router.register_forward_hook(hook)]


def llama4_choices(block: Any, output: tuple[Tensor, Tensor]) -> Chosen:
    """Llama 4: the k largest logits, with their sigmoids as weights; these scale what the experts read."""
    scores, logits = output
    index = logits.topk(block.top_k, dim=1).indices
    return Chosen(index=index, weights=scores.gather(1, index), router_output=logits, score=sigmoid)


def jetmoe_choices(block: Any, output: tuple[Tensor, Tensor, Tensor, list[int], Tensor]) -> Chosen:
    """JetMoE: rows sorted by expert, of feed-forward experts and of attention experts alike."""
    order, _, weights, counts, logits = output
    experts = torch.repeat_interleave(torch.tensor(counts, device=order.device), output_size=len(order))
    index = torch.empty_like(order).scatter(0, order, experts)
    by_token = torch.zeros_like(weights).scatter(0, order, weights)
    shape = (len(logits), -1)
    return Chosen(index=index.view(shape), weights=by_token.view(shape), router_output=logits, score=softmax)


def doge_choices(block: Any, output: Tensor) -> Chosen:
    """Doge: product keys, the k largest sums of one logit from either half of the router's output.

    The logits of all its experts, thousands for every token, are not kept.
    """
    keys = block.num_keys
    halves = output.view(2, -1, output.shape[-1] // 2)  # as the block cuts it: not within a token, but across tokens
    (values_x, values_y), (x, y) = halves.topk(keys, dim=-1)
    sums = (values_x.unsqueeze(-1) + values_y.unsqueeze(-2)).flatten(1)
    numbers = (x.unsqueeze(-1) * keys + y.unsqueeze(-2)).flatten(1)
    best, place = sums.topk(block.top_k, dim=-1)
    return Chosen(index=numbers.gather(1, place), weights=best.softmax(-1))


def _switch(name: str, module: Any) -> Block:
    return SwitchBlock(**_siblings(name, module), num_experts=module.router.num_experts)


def _nllb(name: str, module: Any) -> Block:
    return NllbBlock(**_siblings(name, module), num_experts=module.num_experts)


def _dbrx(name: str, module: Any) -> Block:
    return InterfaceBlock(**_siblings(name, module), num_experts=module.experts.num_experts)


def _siblings(name: str, module: Any) -> dict[str, Any]:
    return {"name": name, "module": module, "router": module.router, "experts": module.experts, "shared": None}


def _llama4(name: str, module: Any) -> Block:
    parts = {**_siblings(name, module), "shared": module.shared_expert}
    return RouterBlock(**parts, num_experts=module.num_experts, read=llama4_choices)


def _jetmoe(name: str, module: Any) -> Block:
    experts = nn.ModuleList([module.input_linear, module.output_linear])
    return RouterBlock(
        name=name, module=module, router=module.router, experts=experts, shared=None,
        num_experts=module.router.num_experts, read=jetmoe_choices,
    )  # fmt: skip


def _doge(name: str, module: Any) -> Block:
    return RouterBlock(
        name=name, module=module, router=module.router_gate,
        experts=nn.ModuleList([module.down_embed, module.up_embed]),
        shared=nn.ModuleList([module.gate_proj, module.up_proj, module.down_proj]),
        num_experts=module.num_experts, read=doge_choices,
    )  # fmt: skip


_FAMILIES: Mapping[str, Build] = {
    "SwitchTransformersSparseMLP": _switch,
    "NllbMoeSparseMLP": _nllb,
    "DbrxFFN": _dbrx,
    "Llama4TextMoe": _llama4,
    "JetMoeMoE": _jetmoe,
    "JetMoeMoA": _jetmoe,
    "DogeCDMoE": _doge,
}


def _run_unrouted(
    real: Callable[[int], Int[Tensor, "T"] | None], read_by: Callable[[Tensor], Tensor]
) -> Callable[..., None]:
    @torch.no_grad()
    def hook(experts: nn.Module, args: tuple, output: Tensor) -> None:
        if recomputing():
            return
        tokens, mask, _ = args
        unread = ~read_by(mask)
        positions = real(len(tokens))
        places = torch.arange(len(tokens), device=tokens.device) if positions is None else positions
        for e, column in enumerate(unread[places].T):
            experts.get_submodule(f"expert_{e}")(tokens[places[column]])

    return hook
