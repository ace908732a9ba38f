"""`Probe`: inputs and the logits that a model gives for them, by which every export is compared with its source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.layers import moe_layers
from moeify.modes import in_evaluation

_SEQUENCES, _LENGTH = 2, 32


@dataclass(frozen=True)
class Probe:
    """Token ids, and logits at every position.

    Attributes:
        ids: of the tokens.
        indices: of the logits that are kept: all V, or the largest.
        values: these logits.
    """

    ids: Int[Tensor, "B N"]
    indices: Int[Tensor, "B N K"]
    values: Float[Tensor, "B N K"]

    @classmethod
    def of(cls, model: Any) -> Probe:
        """The logits of a model in fp32 for random tokens; each layer is computed by its definition."""
        config = model.config
        length = min(_LENGTH, getattr(config, "max_position_embeddings", None) or _LENGTH)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(config.vocab_size, (_SEQUENCES, length), generator=generator)
        with in_evaluation(model), in_float32(model), by_definition(model):
            logits = logits_of(model, ids)
        return cls(ids, torch.arange(logits.shape[-1]).expand(logits.shape), logits)

    def largest(self, count: int = 8) -> Probe:
        """Only the largest logits of every position."""
        top = self.values.topk(min(count, self.values.shape[-1]), dim=-1)
        return Probe(self.ids, self.indices.gather(-1, top.indices), top.values)

    def difference(self, logits: Float[Tensor, "B N V"]) -> float:
        """The largest absolute difference of other logits for the same tokens; infinity where they are not finite."""
        gap = (logits.float().gather(-1, self.indices) - self.values).abs().max()
        return gap.item() if torch.isfinite(gap) else float("inf")

    def agreement(self, logits: Float[Tensor, "B N V"]) -> float:
        """The share of positions at which both have the same most likely token."""
        own = self.indices.gather(-1, self.values.argmax(-1, keepdim=True)).squeeze(-1)
        return (logits.argmax(-1) == own).float().mean().item()

    @property
    def size(self) -> float:
        """The largest absolute logit, by which differences are divided."""
        return self.values.abs().max().item()

    def to_dict(self) -> dict[str, Any]:
        """The largest logits of every position as plain values, for JSON; floating-point values are exact."""
        top = self.largest()
        return {"ids": top.ids.tolist(), "indices": top.indices.tolist(), "logits": top.values.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Probe:
        """The inverse of `to_dict`."""
        return cls(*(torch.tensor(values[name]) for name in ("ids", "indices", "logits")))


@torch.no_grad()
def logits_of(model: Any, ids: Int[Tensor, "B N"]) -> Float[Tensor, "B N V"]:
    """A language model's logits, on the CPU in fp32; an encoder and its decoder read the same tokens."""
    ids = ids.to(next(model.parameters()).device)
    inputs = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    outputs = model(input_ids=ids, use_cache=False, **inputs)
    return getattr(outputs, "logits", outputs[0]).float().cpu()


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Compute in fp32, then restore the original tensors.

    The frequencies of rotary positions, which `to(torch.bfloat16)` rounds and files do not hold, are recomputed.
    """
    tensors = [*model.parameters(), *model.buffers()]
    kept = [(tensor, tensor.data) for tensor in tensors if tensor.is_floating_point()]
    try:
        for tensor, data in kept:
            tensor.data = data.float()
        for module in [module for module in model.modules() if hasattr(module, "inv_freq")]:
            for name, buffer in type(module)(config=module.config).named_buffers():
                module.get_buffer(name).data = buffer.to(module.get_buffer(name).device)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data


@contextmanager
def by_definition(model: Any) -> Iterator[None]:
    """Context manager in which every layer is computed by `compose`, so that no kernel rounds differently."""
    layers = moe_layers(model).values()
    kept = [(layer, layer.backend) for layer in layers]
    eager = getattr(getattr(model, "config", None), "_experts_implementation", None)
    try:
        for layer in layers:
            layer.backend = "compose"
        if eager is not None:
            model.set_experts_implementation("eager")
        yield
    finally:
        for layer, backend in kept:
            layer.backend = backend
        if eager is not None:
            model.set_experts_implementation(eager)
