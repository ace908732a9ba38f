"""One decoding step, one token per sequence, as a list of kernel steps and modules to call between them."""

from __future__ import annotations

import itertools
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from moeify.kernels.cpu.cpp import steps
from moeify.kernels.cpu.cpp.steps import Step
from moeify.serve.cache import PreallocatedLayer
from moeify.serve.decoder import Decoder
from moeify.serve.operands import Buffers, Steps, attention_of, matrix_of, network_of, norm_of


class Program:
    """One decoding step for T sequences, compiled to kernel steps.

    FFNs that the kernel does not support are called as modules. The program holds references to the weights that its
    steps read, and the buffers between them.

    Args:
        decoder: the modules of the model.
        tokens: T, the number of sequences.
    """

    def __init__(self, decoder: Decoder, tokens: int) -> None:
        self.decoder, self.tokens, dtype = decoder, tokens, decoder.dtype
        norm, head = norm_of(decoder.norm), matrix_of(decoder.head, dtype)
        layers = [
            (attention_of(layer, dtype), norm_of(layer.before_mlp), network_of(layer.mlp, dtype))
            for layer in decoder.layers
        ]
        buffers = Buffers(tokens)
        self.x, normed = (buffers(name, len(norm.gain)) for name in ("x", "normed"))
        self.logits = buffers("logits", head.width_out)
        listed: Steps = []
        for attention, before, network in layers:
            listed += attention.to_steps(self.x, normed, buffers)
            listed += [before.step(self.x, normed), *network.to_steps(normed, self.x, buffers)]
        listed += [norm.step(self.x, normed), head.step(normed, self.logits)]
        self.held = norm, head, layers, buffers
        self.ready: list[Any] = []  # functions, and arrays of the kernel steps between them
        for is_call, run in itertools.groupby(listed, callable):
            parts: list[Any] = list(run)
            self.ready += parts if is_call else [(Step * len(parts))(*parts)]
        self.attentions = [0 if callable(part) else sum(map(steps.attends, part)) for part in self.ready]

    def run(
        self,
        ids: Int[Tensor, "T 1"],
        positions: Int[Tensor, "T 1"],
        first: Int[Tensor, "T"],
        cache: list[PreallocatedLayer],
    ) -> Float[Tensor, "T 1 V"]:
        """The logits of the token after each of `ids`; appends their keys and values to the cache."""
        length = cache[0].get_seq_length()
        caches = [layer.append() for layer in cache]
        self.x.copy_(self.decoder.embed(ids)[:, 0])
        cos, sin = self.decoder.rotary(self.x, positions.expand(self.tokens, -1))
        angles = cos[:, 0].contiguous(), sin[:, 0].contiguous()
        for part, attentions in zip(self.ready, self.attentions, strict=True):
            if callable(part):
                part()
            else:
                here, caches = caches[:attentions], caches[attentions:]
                steps.run_steps(part, self.tokens, angles=angles, caches=here, length=length, first=first)
        return self.logits.unsqueeze(1).clone()
