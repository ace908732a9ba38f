"""Gates for adapters that are trained already: one vector per module, all else frozen (PHATGOOSE, arXiv 2402.05859)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeify.experts.lora import LoRA
from moeify.layers import moe_layers
from moeify.moe import MoE
from moeify.routers.topk import TopK, sigmoid


def train_gates(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, steps: int = 100, lr: float = 5e-3, warmup: float = 0.06
) -> dict[str, Float[Tensor, "D"]]:
    """Learn by AdamW a gate v for every module of a model with one adapter: y = W u + σ(v · u) · s B A u.

    v starts at 0, where σ is 1/2: training begins at half the adapter's strength, independent of its own training. The
    model is not changed.

    Args:
        model: with sparse layers of a single expert, and a loss among its outputs.
        batches: arguments of the model by name, labels among them; taken again from the start when they end.
        steps: optimizer steps.
        lr: learning rate; 5e-3 is the paper's, for batches of 1024.
        warmup: the share of the steps in which the learning rate grows to it.

    Returns:
        The gates by the names of their modules, in fp32, as `moeify.compose.save_gates` and `set_gates` take them.

    Raises:
        ValueError: a sparse layer without, or with more than, one LoRA; no sparse layer; or no batch.
    """
    layers = _single(model)
    batches = list(batches)
    if not batches:
        raise ValueError("there is no batch to train gates on; give a list of the model's arguments by name")
    with _gated(model, layers) as gates:
        optimizer = torch.optim.AdamW(gates.values(), lr=lr, weight_decay=0)
        rising = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / max(1, warmup * steps)))
        for batch in islice(cycle(batches), steps):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            rising.step()
        return {name: gate.detach().squeeze(0).clone() for name, gate in gates.items()}


def _single(model: nn.Module) -> dict[str, MoE]:
    layers = moe_layers(model)
    if not layers:
        raise ValueError(
            f"this {type(model).__name__} has no sparse layer; sparsify it with num_experts=1, router=Uniform"
        )
    for name, layer in layers.items():
        if not isinstance(layer.experts, LoRA) or layer.experts.num_experts != 1:
            raise ValueError(
                f"{name} has {layer.experts.num_experts} experts, {type(layer.experts).__name__}, but a gate is of "
                "one LoRA; load each adapter by itself"
            )
    return layers


@contextmanager
def _gated(model: nn.Module, layers: dict[str, MoE]) -> Iterator[dict[str, nn.Parameter]]:
    """Context manager in which gates replace the routers, and only they are trained."""
    routers = {name: layer.router for name, layer in layers.items()}
    learnt = [p for p in model.parameters() if p.requires_grad]
    gates = {}
    try:
        model.requires_grad_(False)
        for name, layer in layers.items():
            down = layer.experts.get_parameter("lora_A")
            gate = TopK(down.shape[-1], 1, k=1, score=sigmoid, normalize=False, init_std=0).to(down.device)
            layer.replace(router=gate)
            gates[name] = gate.weight
        yield gates
    finally:
        for name, layer in layers.items():
            layer.replace(router=routers[name])
        for parameter in learnt:
            parameter.requires_grad_(True)
