"""Loss-free balancing: a controller observes every decision and moves selection biases after the optimizer's step.

If biases moved inside `forward`, activation recomputation would route differently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify import ranks
from moeify.balance.rules import Rule
from moeify.context import recomputing
from moeify.hf.names import EXPERT_GROUPS
from moeify.layers import sparse_layers
from moeify.record import observe
from moeify.routing import Assignment, Routing


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
        """The current bias tensor, on the device of the model."""
        return getattr(self.owner, self.name)

    def exact(self) -> Float[Tensor, "E"]:
        """The bias, converted to fp32 for good if the model was cast: bf16 would lose steps of 1e-3."""
        self.value.data = self.value.data.float()
        return self.value

    def unbiased(self, routing: Routing) -> Float[Tensor, "L E"] | None:
        """What the bias is added to: logits for a `TopK` that selects by them, scores otherwise."""
        return routing.logits if getattr(self.owner, "select", "score") == "logit" else routing.scores

    @property
    def grouped(self) -> bool:
        """Whether a token may use the experts of some groups only; routers of transformers have attributes for it."""
        groups: Any = getattr(self.owner, "expert_groups", None)
        count, keep = (groups.count, groups.keep) if groups else (getattr(self.owner, g, 1) for g in EXPERT_GROUPS)
        return keep < count


@dataclass
class Control:
    """The running controllers of a model; `remove()` stops them and leaves the biases where they are.

    Attributes:
        rule: the update rule of the biases.
        biases: the bias of every controlled layer, by the layer's name.
        active: set to False to freeze the biases.
        memory: the rule's state of every layer between steps, by the layer's name; saved with a checkpoint.
    """

    rule: Rule
    biases: dict[str, Bias]
    active: bool = True
    memory: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    seen: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    postponed: Counter[str] = field(default_factory=Counter)
    handles: list[Any] = field(default_factory=list)
    gathered: bool = False

    def observe(self, name: str, routing: Routing) -> None:
        """Add the observation of one layer in one training forward pass."""
        if not self.active or name not in self.biases or not self._is_in_training(name):
            return
        assert isinstance(routing, Assignment)
        bias = self.biases[name]
        for key, value in self.rule.observe(routing, bias.unbiased(routing), bias.value).items():
            layer = self.seen.setdefault(name, {})
            layer[key] = layer[key] + value if key in layer else value.clone()

    def _is_in_training(self, name: str) -> bool:
        """Whether a pass counts as training: it has gradients, and is counted once.

        Re-entrant activation checkpointing runs first without gradients and then with them; generation only without.
        """
        if not torch.is_grad_enabled():
            self.postponed[name] += 1
            return False
        if not recomputing():
            self.postponed[name] = 0
            return True
        if not self.postponed[name]:
            return False
        self.postponed[name] -= 1
        return True

    @torch.no_grad()
    def gather(self) -> None:
        """Sum the loads of the step over all ranks ahead of `step`, which then needs no other rank and cannot fail."""
        if not self.gathered:
            for name in sorted(self.seen):
                for value in self.seen[name].values():
                    ranks.all_reduce(value)
        self.gathered = True

    @torch.no_grad()
    def step(self, *_: Any) -> None:
        """Move every bias by the loads of all ranks, and reset them."""
        self.gather()
        for name in sorted(self.seen):
            bias = self.biases[name].exact()
            bias.copy_(self.rule.move(bias, self.seen[name], self.memory.setdefault(name, {})))
        self.forget()

    def forget(self) -> None:
        """Drop the loads of a step that the optimizer does not take; no bias moves."""
        self.seen.clear()
        self.postponed.clear()
        self.gathered = False

    def remove(self) -> None:
        """Stop observing and moving."""
        for handle in self.handles:
            handle.remove()


def control(model: nn.Module, optimizer: torch.optim.Optimizer, rule: Rule) -> Control:
    """Balance a model by moving its routers' selection biases after every optimizer step.

    Works on routers of moeify built with `selection_bias=True`, and on models of transformers whose layers have an
    `e_score_correction_bias` or `expert_bias`, which transformers itself never moves; rounded ones become fp32, now
    and in every step. Only forward passes in training, with gradients, are counted, once each where activation
    checkpointing repeats them. On several processes all must train the same layers.

    Raises:
        ValueError: no router of the model has a selection bias; a rule that does not support group-limited routing.
    """
    biases = dict(_biases(model))
    if not biases:
        raise ValueError(
            f"no router of {type(model).__name__} has a selection bias to move; build them with selection_bias=True, "
            "as in router=partial(TopK, selection_bias=True)"
        )
    grouped = [name for name, bias in biases.items() if bias.grouped]
    if rule.needs_all and grouped:
        raise ValueError(
            f"{type(rule).__name__} assumes that tokens may use every expert, and the router of {grouped[0]} "
            "limits them to some groups, so its biases would not balance; use Sign() or Proportional(), or no groups"
        )
    for bias in biases.values():
        bias.exact()
    control = Control(rule, biases)

    def observe_training(name: str, routing: Routing) -> None:
        if model.training:
            control.observe(name, routing)

    control.handles = [
        *observe(model, observe_training, repeated=True),
        optimizer.register_step_post_hook(control.step),
    ]
    return control


def _biases(model: nn.Module) -> Iterator[tuple[str, Bias]]:
    for name, layer in sparse_layers(model).items():
        for owner, key in layer.selection_biases():
            yield name, Bias(owner, key)
