"""A decoder's step for one token per sequence, as a list of what to do: steps of the kernel, and modules between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moeify.backends.cpp import kernel_activation, projections_of
from moeify.backends.cpp import refuse as kernel_refuses
from moeify.compress.quantized_layers import QuantizedExperts, QuantizedLinear
from moeify.experts import Experts
from moeify.find.dense import DenseFFN
from moeify.hf.interface import HfExperts
from moeify.kernels.cpu.cpp import steps
from moeify.kernels.cpu.cpp.steps import Step
from moeify.kernels.stacked import Glu, name_of
from moeify.moe import MoE
from moeify.routers.topk import TopK
from moeify.routing import assign
from moeify.serve.cache import PreallocatedLayer
from moeify.serve.decoder import Decoder, Layer, Linear, is_linear


class Program:
    """What a decoder does for one token of each of T sequences, ready to run.

    A layer's network that the kernel does not know is called as the module that it is. Weights are read where they
    lie; the buffers between the steps, and norms and routers in fp32, belong to the program.

    Args:
        decoder: the parts of the model.
        tokens: T.
    """

    def __init__(self, decoder: Decoder, tokens: int) -> None:
        self.decoder, self.tokens, self.dtype = decoder, tokens, decoder.dtype
        self.held: list[object] = []
        self.buffers: dict[tuple[str, int], Tensor] = {}
        self.parts: list[list[Step] | Callable[[], None]] = [[]]
        width = len(decoder.norm.weight)
        self.x = self._buffer("x", width)
        for layer in decoder.layers:
            self._attention(layer)
            self._network(layer)
        self._norm(decoder.norm, self.x, self._buffer("normed", width))
        self.logits = self._buffer("logits", decoder.head.out_features)
        self._linear(decoder.head, self._buffer("normed", width), self.logits)
        self.ready = [part if callable(part) else (Step * len(part))(*part) for part in self.parts if part]
        self.attentions = [0 if callable(part) else sum(map(steps.attends, part)) for part in self.ready]

    def run(
        self,
        ids: Int[Tensor, "T 1"],
        positions: Int[Tensor, "T 1"],
        first: Int[Tensor, "T"],
        cache: list[PreallocatedLayer],
    ) -> Float[Tensor, "T 1 V"]:
        """The logits of the token after each of `ids`, whose keys and values join the cache."""
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

    def _attention(self, layer: Layer) -> None:
        a = layer.attention
        head = a.head_dim
        normed = self._buffer("normed", self.x.shape[1])
        q, k, v = (self._buffer(letter, getattr(a, f"{letter}_proj").out_features) for letter in "qkv")
        self._norm(layer.before_attention, self.x, normed)
        for letter, y in zip("qkv", (q, k, v), strict=True):
            self._linear(getattr(a, f"{letter}_proj"), normed, y)
        for name, y in (("q_norm", q), ("k_norm", k)):
            if (norm := getattr(a, name, None)) is not None:
                self._norm(norm, y, y)
        self._add(steps.rotate(q, head), steps.rotate(k, head))
        attended = self._buffer("attended", q.shape[1])
        self._add(steps.attend(q, k, v, attended, head=head, scale=a.scaling, dtype=self.dtype))
        self._linear(a.o_proj, attended, self.x, adds=True)

    def _network(self, layer: Layer) -> None:
        normed = self._buffer("normed", self.x.shape[1])
        self._norm(layer.before_mlp, self.x, normed)
        if not (self._dense(layer.mlp, normed) or self._theirs(layer.mlp, normed) or self._ours(layer.mlp, normed)):
            self.parts += [lambda: self._call(layer.mlp, normed), []]

    def _call(self, module: nn.Module, normed: Tensor) -> None:
        output = module(normed.to(self.dtype).unsqueeze(1))
        self.x += output.view_as(self.x)

    def _dense(self, mlp: nn.Module, x: Tensor) -> bool:
        """down(act(gate(x)) · up(x))."""
        parts = _gated(mlp)
        if parts is None:
            return False
        first, second, down, activation = parts
        gate, up = (self._buffer(name, first.out_features) for name in ("gate", "up"))
        self._linear(first, x, gate)
        self._linear(second, x, up)
        self._add(steps.gated_activation(gate, up, gate, activation))
        self._linear(down, gate, self.x, adds=True)
        return True

    def _theirs(self, block: Any, x: Tensor) -> bool:
        """A sparse block of transformers: softmax, top k, experts, and nothing else."""
        if set(dict(block.named_children())) != {"gate", "experts"} or not hasattr(block.gate, "top_k"):
            return False
        if set(dict(block.gate.named_parameters())) != {"weight"} or list(block.gate.buffers()):
            return False
        experts = block.experts.experts if isinstance(block.experts, QuantizedExperts) else HfExperts(block.experts)
        normalize = getattr(block.gate, "norm_topk_prob", True)
        return self._experts(
            experts, x, block.gate.weight, None, k=block.gate.top_k, score="softmax", by_logit=False, bias=None,
            normalize=normalize, scale=1.0,
        )  # fmt: skip

    def _ours(self, moe: nn.Module, x: Tensor) -> bool:
        """A layer with token choice, and perhaps a dense network beside."""
        if (
            not isinstance(moe, MoE)
            or type(moe.router) is not TopK
            or moe.router.per != "token"
            or moe.router.expert_groups
        ):
            return False
        r = moe.router
        if r.score.__name__ not in steps.SCORES:
            return False
        bias = None if r.selection_bias is None else self._hold(r.selection_bias.float())
        if not self._experts(
            moe.experts, x, r.weight, r.bias, k=r.k, score=r.score.__name__, by_logit=r.select == "logit", bias=bias,
            normalize=r.normalize, scale=r.scale,
        ):  # fmt: skip
            return False
        if moe.shared is not None and not self._dense(moe.shared, x):
            self.parts += [lambda: self._call(moe.shared, x), []]
        return True

    def _experts(self, experts: Experts, x: Tensor, router: Tensor, router_bias: Tensor | None, **choice: Any) -> bool:
        """Router logits in fp32, then the choice and the experts."""
        some = torch.zeros(1, x.shape[1], dtype=self.dtype)
        routing = assign(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), experts.num_experts)
        if kernel_refuses(some, routing, experts) is not None:
            return False
        p = projections_of(experts)
        assert p is not None
        layer = steps.Experts(
            x.shape[1], (p.up, p.up_bias, p.up_scales), (p.down, p.down_bias, p.down_scales),
            p.hidden, p.group_size, *kernel_activation(p.activation),
        )  # fmt: skip
        logits = self._buffer("router", len(router))
        weight = self._hold(router.detach().float().unsqueeze(0).contiguous())
        bias = None if router_bias is None else self._hold(router_bias.detach().float().unsqueeze(0))
        self.held.append(layer)
        self._add(
            steps.linear(x, logits, weight, bias=bias, dtype=torch.float32),
            steps.experts(x, logits, self.x, layer, dtype=self.dtype, **choice),
        )
        return True

    def _norm(self, norm: Any, x: Tensor, y: Tensor) -> None:
        self._add(steps.norm(x, y, self._hold(norm.weight.detach().float()), norm.variance_epsilon))

    def _linear(self, linear: Linear, x: Tensor, y: Tensor, *, adds: bool = False) -> None:
        if isinstance(linear, QuantizedLinear):
            w = linear.map
            weight, scales, group_size, bias = w.weight, w.scales, w.group_size, w.bias
        else:
            weight, scales, group_size = linear.weight.detach().unsqueeze(0), None, 0
            bias = None if linear.bias is None else linear.bias.detach().unsqueeze(0)
        bias = None if bias is None else self._hold(bias.to(self.dtype))
        self._hold(weight)
        self._add(
            steps.linear(x, y, weight, scales=scales, group_size=group_size, bias=bias, dtype=self.dtype, adds=adds)
        )

    def _add(self, *more: Step) -> None:
        last = self.parts[-1]
        assert isinstance(last, list)
        last += more

    def _hold(self, tensor: Tensor) -> Tensor:
        self.held.append(tensor)
        return tensor

    def _buffer(self, name: str, width: int) -> Tensor:
        return self.buffers.setdefault((name, width), torch.empty(self.tokens, width))


def _gated(mlp: Any) -> tuple[Any, Any, Any, str] | None:
    """Gate, up projection, down projection and activation of a gated network, as transformers or we name them."""
    projections: list[Any]
    if isinstance(mlp, DenseFFN):
        projections, act = [*mlp.ups, mlp.down], mlp.activation.act if isinstance(mlp.activation, Glu) else None
    elif set(dict(mlp.named_children())) - {"act_fn"} == {"gate_proj", "up_proj", "down_proj"}:
        projections, act = [mlp.gate_proj, mlp.up_proj, mlp.down_proj], mlp.act_fn
    else:
        return None
    activation = None if act is None else name_of(act)
    if activation is None or len(projections) != 3 or not all(is_linear(module) for module in projections):
        return None
    gate, up, down = projections
    return gate, up, down, activation
