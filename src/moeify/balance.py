"""Controllers: balance without a loss, by a bias that moves an expert's chance to be chosen but never its weight.

A controller watches the decisions of every forward pass and moves the biases once, after the optimizer's step: inside
`forward`, recomputation would route differently.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.moe import MoE
from moeify.record import native_layers, observe
from moeify.registry import register
from moeify.routers.topk import TopK
from moeify.routing import Assignment, Routing


class Rule(ABC):
    """How the bias of one layer follows from what was observed of it since the last step."""

    @abstractmethod
    def observe(
        self, routing: Assignment, unbiased: Float[Tensor, "L E"] | None, bias: Float[Tensor, "E"]
    ) -> dict[str, Tensor]:
        """What to add up over the micro-batches and ranks of a step.

        Args:
            routing: the decision.
            unbiased: what the experts were chosen by, before the bias was added: scores, or logits.
            bias: the bias that the decision was made with.
        """

    @abstractmethod
    def move(self, bias: Float[Tensor, "E"], seen: dict[str, Tensor]) -> Float[Tensor, "E"]:
        """The new bias."""


@register("controller", "sign")
@dataclass(frozen=True)
class Sign(Rule):
    """b_j ← b_j + rate · sign(mean load - load_j): loss-free balancing (arXiv 2408.15664, algorithm 1; DeepSeek-V3).

    Attributes:
        rate: DeepSeek-V3 uses 1e-3 over hundreds of thousands of steps; short runs want 1e-2.
    """

    rate: float = 1e-3

    def observe(
        self, routing: Assignment, unbiased: Float[Tensor, "L E"] | None, bias: Float[Tensor, "E"]
    ) -> dict[str, Tensor]:
        """The rows asked of each expert."""
        return {"load": routing.demand.float()}

    def move(self, bias: Float[Tensor, "E"], seen: dict[str, Tensor]) -> Float[Tensor, "E"]:
        """One step towards the underloaded experts."""
        load = seen["load"]
        return bias + self.rate * torch.sign(load.mean() - load)


@register("controller", "quantile")
@dataclass(frozen=True)
class Quantile(Rule):
    """The bias that would have balanced the last batch: a quantile over its tokens (J. Su 2026, kexue.fm 11619).

    With β = -b: α_i is the (k+1)-th largest of s_i - β over experts, and β_j the (T·k/E + 1)-th largest of
    s_ij - α_i over tokens. Averaged over the micro-batches of a step.

    Attributes:
        ema: share of the old bias that is kept.
    """

    ema: float = 0.0

    def observe(
        self, routing: Assignment, unbiased: Float[Tensor, "L E"] | None, bias: Float[Tensor, "E"]
    ) -> dict[str, Tensor]:
        """The balancing bias of this micro-batch, and that it is one.

        Raises:
            ValueError: the decision keeps no scores or has no fixed k, or every expert is chosen anyway.
        """
        if unbiased is None or routing.index is None:
            raise ValueError("quantile balancing needs a router that keeps its scores and chooses k experts per token")
        s = unbiased.detach().float()
        decisions, num_experts = s.shape
        k = routing.index.shape[1]
        if k >= num_experts:
            raise ValueError(f"quantile balancing needs k < E, and every token already uses all {num_experts} experts")
        alpha = (s + bias).topk(k + 1, dim=-1).values[:, -1:]
        rank = min(decisions * k // num_experts + 1, decisions)
        beta = (s - alpha).topk(rank, dim=0).values[-1]
        return {"bias": -beta, "batches": torch.ones((), device=s.device)}

    def move(self, bias: Float[Tensor, "E"], seen: dict[str, Tensor]) -> Float[Tensor, "E"]:
        """The average of what the micro-batches wanted, centred: a common shift of the bias chooses nothing."""
        wanted = seen["bias"] / seen["batches"]
        return self.ema * bias + (1 - self.ema) * (wanted - wanted.mean())


@dataclass(frozen=True)
class Bias:
    """The selection bias of one layer: a buffer of its router, and saved with it.

    Attributes:
        owner: the module that holds the bias.
        name: the name of the buffer.
    """

    owner: nn.Module
    name: str

    @property
    def value(self) -> Float[Tensor, "E"]:
        """The bias, wherever the model has been moved since."""
        return getattr(self.owner, self.name)

    def unbiased(self, routing: Routing) -> Float[Tensor, "L E"] | None:
        """What the bias is added to: logits for a `TopK` that selects by them, scores otherwise."""
        return routing.logits if getattr(self.owner, "select", "score") == "logit" else routing.scores


@dataclass
class Control:
    """The running controllers of a model; `remove()` stops them and leaves the biases where they are.

    Attributes:
        rule: how biases move.
        biases: the bias of every controlled layer, by the layer's name.
        active: set to False to freeze the biases.
    """

    rule: Rule
    biases: dict[str, Bias]
    active: bool = True
    seen: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)

    def observe(self, name: str, routing: Routing) -> None:
        """Add what one forward pass in training tells of one layer."""
        if not self.active or name not in self.biases or not torch.is_grad_enabled():
            return
        assert isinstance(routing, Assignment)
        bias = self.biases[name]
        for key, value in self.rule.observe(routing, bias.unbiased(routing), bias.value).items():
            layer = self.seen.setdefault(name, {})
            layer[key] = layer[key] + value if key in layer else value.clone()

    @torch.no_grad()
    def step(self, *_: Any) -> None:
        """Move every bias by what all ranks saw, and forget it."""
        for name in sorted(self.seen):
            seen = self.seen[name]
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                for value in seen.values():
                    torch.distributed.all_reduce(value)
            bias = self.biases[name].value
            bias.copy_(self.rule.move(bias.float(), seen))
        self.seen.clear()

    def remove(self) -> None:
        """Stop observing and moving."""
        for handle in self.handles:
            handle.remove()


def control(model: nn.Module, optimizer: torch.optim.Optimizer, rule: Rule) -> Control:
    """Balance a model by moving its routers' selection biases after every optimizer step.

    Works on our routers built with `selection_bias=True`, and on native models of transformers whose layers have an
    `e_score_correction_bias` or `expert_bias`, which transformers itself never moves; rounded ones become fp32. Only
    forward passes in training, with gradients, are counted. On several processes all must train the same layers.

    Raises:
        ValueError: no router of the model has a selection bias.
    """
    biases = dict(_biases(model))
    if not biases:
        raise ValueError(
            f"no router of {type(model).__name__} has a selection bias to move; build them with selection_bias=True, "
            "as in router=partial(TopK, selection_bias=True)"
        )
    control = Control(rule, biases)

    def observe_training(name: str, routing: Routing) -> None:
        if model.training:
            control.observe(name, routing)

    control.handles = [*observe(model, observe_training), optimizer.register_step_post_hook(control.step)]
    return control


def _biases(model: nn.Module) -> Iterator[tuple[str, Bias]]:
    for name, moe in model.named_modules():
        if isinstance(moe, MoE):
            for router in moe.router.modules():
                if isinstance(router, TopK) and router.selection_bias is not None:
                    yield name, Bias(router, "selection_bias")
    for name, (_, experts) in native_layers(model):
        for owner in _outside(experts, model.get_submodule(name)):
            for key in _NATIVE_BIASES & (owner._buffers.keys() | owner._parameters.keys()):
                bias = getattr(owner, key)
                bias.data = bias.data.float()  # steps of 1e-3 would be lost in bf16
                yield name, Bias(owner, key)


_NATIVE_BIASES = {"e_score_correction_bias", "expert_bias"}


def _outside(experts: nn.Module, block: nn.Module) -> Iterator[nn.Module]:
    inside = set(experts.modules())
    return (module for module in block.modules() if module not in inside)
