"""Controllers: balance without a loss, by a bias that moves an expert's chance to be chosen but never its weight.

A controller watches the decisions of every forward pass and moves the biases once, after the optimizer's step: inside
`forward`, recomputation would route differently.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
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
    def observe(self, routing: Assignment, bias: Float[Tensor, "E"]) -> dict[str, Tensor]:
        """What to add up over the micro-batches and ranks of a step."""

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

    def observe(self, routing: Assignment, bias: Float[Tensor, "E"]) -> dict[str, Tensor]:
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

    def observe(self, routing: Assignment, bias: Float[Tensor, "E"]) -> dict[str, Tensor]:
        """The balancing bias of this micro-batch, and that it is one.

        Raises:
            ValueError: the decision keeps no scores, or every expert is chosen anyway.
        """
        if routing.scores is None:
            raise ValueError("quantile balancing needs a router that keeps its scores")
        s = routing.scores.detach().float()
        decisions, num_experts = s.shape
        k = int(routing.choice.max()) + 1 if routing.choice is not None else 1
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


@dataclass
class Control:
    """The running controllers of a model; `remove()` stops them and leaves the biases where they are.

    Attributes:
        rule: how biases move.
        biases: the fp32 bias of every controlled layer; they are the routers' own buffers, and saved with them.
        active: set to False to freeze the biases.
    """

    rule: Rule
    biases: dict[str, Callable[[], Tensor]]
    active: bool = True
    seen: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)

    def observe(self, name: str, routing: Routing) -> None:
        """Add what one forward pass in training tells of one layer."""
        if not self.active or name not in self.biases or not torch.is_grad_enabled():
            return
        assert isinstance(routing, Assignment)
        for key, value in self.rule.observe(routing, self.biases[name]()).items():
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
            bias = self.biases[name]()
            bias.copy_(self.rule.move(bias.float(), seen))
        self.seen.clear()

    def remove(self) -> None:
        """Stop observing and moving."""
        for handle in self.handles:
            handle.remove()


def control(model: nn.Module, optimizer: torch.optim.Optimizer, rule: Rule) -> Control:
    """Balance a model by moving its routers' selection biases after every optimizer step.

    Works on our routers built with `selection_bias=True`, and on native models of transformers whose routers have an
    `e_score_correction_bias`, which transformers itself never moves. On several processes all of them must train the
    same layers.

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
    control.handles = [*observe(model, control.observe), optimizer.register_step_post_hook(control.step)]
    return control


def _biases(model: nn.Module) -> Any:
    for name, moe in model.named_modules():
        if isinstance(moe, MoE):
            for router in moe.router.modules():
                if isinstance(router, TopK) and router.selection_bias is not None:
                    yield name, lambda router=router: router.selection_bias
    for name, (router, _) in native_layers(model):
        for owner in [] if router is None else router.modules():
            if "e_score_correction_bias" in owner._buffers or "e_score_correction_bias" in owner._parameters:
                yield name, lambda owner=owner: owner.e_score_correction_bias
