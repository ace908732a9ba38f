"""Ways to break a sparse model on purpose, one for every fault that `moeify.inspect.diagnose` knows.

`INJECTORS[fault](case)` breaks the model, its batches or its training in place; it raises `NotBroken` where the model
has no part that could break so. Everything is done from outside: weights, hooks and wrappers, as bugs in the wild
would have it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.layers import HfLayer, SparseLayer, sparse_layers
from moeify.modes import in_evaluation
from moeify.routers import Capacity
from moeify.train import SparseArguments, SparseTrainer

SMALL = 1e-2  # logits of a router whose scores are uniform


class NotBroken(Exception):
    """The model has nothing that could break so; the message says what it lacks."""


@dataclass
class Case:
    """A model, what it is called with, and how it is trained.

    Attributes:
        model: the model.
        batches: what it is called with.
        sparse: how `SparseTrainer` balances it.
        accumulation: micro-batches per step.
        flaw: a balance loss by another definition, in a plain trainer, in the place of ours.
    """

    model: Any
    batches: list[dict[str, Tensor]]
    sparse: SparseArguments = field(default_factory=lambda: SparseArguments(progress=False))
    accumulation: int = 2
    flaw: dict[str, bool] | None = None

    @property
    def layer(self) -> SparseLayer:
        """The last sparse layer, which is the one to be broken."""
        return list(sparse_layers(self.model).values())[-1]

    def trainer(self) -> Any:
        """A trainer that would train the model so."""
        args = transformers.TrainingArguments(
            tempfile.mkdtemp(), per_device_train_batch_size=2, gradient_accumulation_steps=self.accumulation,
            use_cpu=True, report_to=[],
        )  # fmt: skip
        if self.flaw is None:
            return SparseTrainer(model=self.model, args=args, sparse=self.sparse)
        return FlawedTrainer(model=self.model, args=args, flaw=self.flaw)


class FlawedTrainer(transformers.Trainer):
    """Adds transformers' own balance loss by hand, over all layers or each, with or without the attention mask."""

    def __init__(self, *args: Any, flaw: dict[str, bool], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flaw = flaw

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of the task, and the balance loss of this micro-batch."""
        seen: list[Tensor] = []

        def keep(router: nn.Module, args: tuple, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output.logits)

        layers = list(sparse_layers(model).values())
        hooks = [layer.router.register_forward_hook(keep) for layer in layers]
        try:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        mask = inputs.get("attention_mask") if self.flaw.get("mask", True) else None
        mask = None if mask is not None and mask.numel() != len(seen[0]) else mask
        groups = [tuple(seen)] if self.flaw.get("pooled") else [(logits,) for logits in seen]
        k = int(layers[0].rows_per_token())
        parts = [balance(group, layers[0].num_experts, k, mask) for group in groups]
        return loss + 0.01 * sum(parts) / len(parts)


balance = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func

Injector = Callable[[Case], None]
INJECTORS: dict[str, Injector] = {}


def injector(break_it: Injector) -> Injector:
    """Name an injector after its fault."""
    INJECTORS[break_it.__name__] = break_it
    return break_it


def stacked(layer: SparseLayer) -> dict[str, Tensor]:
    """The stacked weights of experts, (E, ...)."""
    return {name: p.data for name, p in layer.experts.named_parameters() if len(p) == layer.num_experts}


def wrapped_linear(layer: SparseLayer, change: Callable[[Tensor], Tensor]) -> None:
    """Change what the router's projection returns."""
    forward, linear = layer.router.forward, F.linear

    def changed(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(F, "linear", lambda *operands: change(linear(*operands))):
            return forward(*args, **kwargs)

    layer.router.forward = changed


@torch.no_grad()
def constant_direction(case: Case) -> Tensor:
    """The weights of a projection of the layer's tokens that comes closest to 1 for all of them."""
    seen: list[Tensor] = []
    hook = case.layer.router.register_forward_pre_hook(
        lambda router, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).float())
    )
    with in_evaluation(case.model):
        for batch in case.batches:
            case.model(**batch)
    hook.remove()
    x = torch.cat(seen)
    return torch.linalg.lstsq(x, torch.ones(len(x), 1)).solution[:, 0]


@torch.no_grad()
def lift(case: Case, experts: slice, by: float) -> None:
    """Add a number to the logits of some experts; a selection bias does not make up for it."""
    router = case.layer.router
    if getattr(router, "bias", None) is not None:
        router.bias[experts] += by
    else:
        router.weight[experts] += by * constant_direction(case)
    for owner, name in case.layer.selection_biases():
        if by > 0:
            getattr(owner, name).mul_(1e-6)
        else:
            getattr(owner, name)[experts] -= 1


@injector
def not_finite(case: Case) -> None:
    next(iter(stacked(case.layer).values()))[0, 0] = float("nan")


@injector
def frozen_router(case: Case) -> None:
    case.layer.router.requires_grad_(False)


@injector
def frozen_experts(case: Case) -> None:
    case.layer.experts.requires_grad_(False)


@injector
def top1_renormalised(case: Case) -> None:
    router = case.layer.router
    name = "k" if hasattr(router, "k") else "top_k"
    setattr(router, name, 1)
    if not getattr(router, "norm_topk_prob", True):
        router.norm_topk_prob = True


@injector
def exploding_logits(case: Case) -> None:
    decided: list[Tensor] = []
    wrapped_linear(case.layer, lambda logits: decided.append(logits) or logits)
    with torch.no_grad(), in_evaluation(case.model):
        case.model(**case.batches[0])
    del case.layer.router.forward
    scale = 100 / decided[0].abs().amax(-1).median()
    for p in case.layer.router.parameters():
        p.data *= scale


@injector
def detached_router(case: Case) -> None:
    layer = case.layer
    if not isinstance(layer, HfLayer):
        layer.router.register_forward_hook(lambda r, args, y: replace(y, weight=y.weight.detach()))
        return

    def cut(experts: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        x, *rest = args
        return (x, *(t.detach() for t in rest)), {
            n: v if n == "hidden_states" else v.detach() for n, v in kwargs.items()
        }

    layer.experts.register_forward_pre_hook(cut, with_kwargs=True)


@injector
def half_precision_router(case: Case) -> None:
    wrapped_linear(case.layer, lambda logits: logits.bfloat16().to(logits.dtype))


@injector
def noisy_evaluation(case: Case) -> None:
    wrapped_linear(case.layer, lambda logits: logits + torch.randn_like(logits))


@injector
def biased_weights(case: Case) -> None:
    found = list(case.layer.selection_biases())
    if not found:
        raise NotBroken("no selection bias")
    owner, name = found[0]

    def hook(router: nn.Module, args: tuple, output: Any) -> Any:
        bias = getattr(owner, name)
        if isinstance(output, tuple):
            logits, weights, index = output
            wrong = F.normalize((logits.sigmoid() + bias).gather(-1, index), p=1.0, dim=-1)
            return logits, wrong * weights.sum(-1, keepdim=True), index
        return rerouted(output, bias)

    case.layer.router.register_forward_hook(hook)


def rerouted(routing: Any, bias: Tensor) -> Any:
    """The decision with a bias in the weights."""
    from moeify.routing import assign

    index = routing.choices.indices
    weights = F.normalize((routing.scores + bias).gather(-1, index), p=1.0, dim=-1)
    return assign(index, weights, len(routing.counts), shape=routing.shape, evidence=routing.evidence)


@injector
def identical_experts(case: Case) -> None:
    for weights in stacked(case.layer).values():
        weights[:] = weights[:1].clone()


@injector
def super_experts(case: Case) -> None:
    down = next(p for name, p in stacked(case.layer).items() if "down" in name and p.dim() == 3)
    down[1] *= 3e4


@injector
def bias_unmoved(case: Case) -> None:
    found = list(case.layer.selection_biases())
    if not found:
        raise NotBroken("no selection bias")
    for owner, name in found:
        getattr(owner, name).zero_()
    case.sparse = replace(case.sparse, controller=None)


@injector
def balance_off(case: Case) -> None:
    case.sparse = replace(case.sparse, balance=0.0, controller=None)


@injector
def balance_accumulated(case: Case) -> None:
    case.flaw, case.accumulation = {}, 4


@injector
def balance_pooled(case: Case) -> None:
    case.flaw, case.accumulation = {"pooled": True}, 1


@injector
def balance_padded(case: Case) -> None:
    if isinstance(case.layer, HfLayer):
        case.flaw, case.accumulation = {"mask": False}, 1
        return
    pad = case.model.config.pad_token_id
    for batch in case.batches:  # our layers never see padding that is masked, so the collator forgets the mask
        batch["input_ids"][:, -8:] = pad


@injector
def last_micro_batch(case: Case) -> None:
    layer = case.layer
    layer.module.register_buffer("expert_load", torch.zeros(layer.num_experts), persistent=False)

    def keep(router: nn.Module, args: tuple, output: Any) -> None:
        index = output[2] if isinstance(output, tuple) else output.choices.indices
        layer.module.expert_load.copy_(index.flatten().bincount(minlength=layer.num_experts))

    layer.router.register_forward_hook(keep)


@injector
def capacity_drops(case: Case) -> None:
    layer = case.layer
    if not isinstance(layer, HfLayer):
        layer.module.replace(router=Capacity(layer.router, factor=0.75, eval_factor=0.75))
        return

    def drop(router: nn.Module, args: tuple, output: tuple) -> tuple:
        logits, weights, index = output
        chosen = F.one_hot(index, layer.num_experts).flatten(0, 1)  # (T K, E)
        place = (chosen.cumsum(0) * chosen).sum(-1).view(index.shape)
        slots = int(0.75 * index.numel() / layer.num_experts)
        return logits, weights * (place <= slots), index

    layer.router.register_forward_hook(drop)


@injector
@torch.no_grad()
def undecided_router(case: Case) -> None:
    for p in case.layer.router.parameters():
        p.zero_()


@injector
@torch.no_grad()
def blind_collapse(case: Case) -> None:
    layer = case.layer
    for p in layer.router.parameters():
        p.mul_(SMALL)
    lift(case, slice(layer.num_experts // 2), 10 * SMALL)


@injector
@torch.no_grad()
def collapse(case: Case) -> None:
    half = slice(case.layer.num_experts // 2, None)
    case.layer.router.weight[half] = 0
    lift(case, half, -12)


@injector
@torch.no_grad()
def dead_experts(case: Case) -> None:
    case.layer.router.weight[-1:] = 0
    lift(case, slice(-1, None), -12)
