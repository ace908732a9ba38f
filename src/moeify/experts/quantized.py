"""Quantised experts, with integer weights of 8 or 4 bits: a half or a quarter of the memory of bf16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.experts.base import Experts, cut
from moeify.kernels.cpu.huge_pages import in_huge_pages
from moeify.kernels.stacked import Activation, Stacked

_BLOCK, _QUARTER = 128, 32
_HUGE = 2**21  # bytes of a huge page


class Weights(nn.Module):
    """E integer matrices with scales; a weight is an integer times its scale.

    With 8 bits a row of a matrix shares a scale. With 4 bits a group of neighbouring weights does; rows are padded with
    zeros to blocks of 128, and of a block the little-endian 16-bit word i holds the numbers i, i + 32, i + 64 and i +
    96, lowest bits first, as number + 8. Buffers: `weight`, int8 (E, O, D) or uint8 (E, O, bytes); `scales`, (E, O) or
    (E, O, groups), which stay in fp32 when the module is cast; `bias` (E, O) or None.

    Args:
        num_experts: E.
        width_out: O.
        width: D.
        bits: 8 or 4.
        group_size: 32 or 64, of 4 bits only.
        bias: have a bias.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self, num_experts: int, width_out: int, width: int, bits: int = 8, group_size: int = 64, bias: bool = False
    ) -> None:
        super().__init__()
        self.width, self.bits, self.group_size = width, bits, group_size
        padded = -(-width // _BLOCK) * _BLOCK
        shape = (num_experts, width_out)
        if bits == 8:
            numbers, scales = _filled(0, *shape, width, dtype=torch.int8), _filled(1, *shape)
        else:
            numbers, scales = (
                _filled(0x88, *shape, padded // 2, dtype=torch.uint8),
                _filled(1, *shape, padded // group_size),
            )
        self.register_buffer("weight", numbers)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", torch.zeros(shape) if bias else None)

    @torch.no_grad()
    def fill(self, weight: Float[Tensor, "E O D"], bias: Float[Tensor, "E O"] | None) -> None:
        """Round weights to the nearest numbers, expert by expert; the scale is the smallest without overflow."""
        for e, matrix in enumerate(weight):
            if self.bits == 8:
                scales = _not_zero(matrix.float().abs().amax(-1) / 127)
                self.weight[e] = (matrix.float() / scales.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
            else:
                blocks = F.pad(matrix.float(), (0, self.scales.shape[-1] * self.group_size - self.width))
                groups = blocks.unflatten(-1, (-1, self.group_size))
                extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
                scales = _not_zero(extreme / -8)  # the number that is largest becomes -8, which has no counterpart
                numbers = (groups / scales.unsqueeze(-1)).round().clamp(-8, 7) + 8
                self.weight[e] = _pack(numbers.flatten(-2).to(torch.uint8))
            self.scales[e] = scales
        if bias is not None:
            self.bias = bias.detach().clone()

    def of(self, expert: int, dtype: torch.dtype) -> Float[Tensor, "O D"]:
        """The dequantised weights of one expert."""
        if self.bits == 8:
            return (self.weight[expert].float() * self.scales[expert].unsqueeze(-1)).to(dtype)
        numbers = _unpack(self.weight[expert]).float().unflatten(-1, (-1, self.group_size)) - 8
        return (numbers * self.scales[expert].unsqueeze(-1)).flatten(-2)[:, : self.width].to(dtype)

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """Multiply each row by its own expert's matrix, unpacked in turn."""
        parts = [
            F.linear(part, self.of(e, rows.dtype), None if self.bias is None else self.bias[e].to(rows.dtype))
            for e, part in enumerate(rows.split(counts.tolist()))
            if len(part)
        ]
        return torch.cat(parts) if parts else rows.new_zeros(0, self.scales.shape[1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Weights:
        exact = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float32:
            self.scales = exact.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        """Shapes and bits."""
        return f"{tuple(self.scales.shape[:2])} x {self.width}, bits={self.bits}"


class Quantized(Experts):
    """E feed-forward networks with weights of 8 or 4 bits, for inference.

    The weights are buffers: they are saved and loaded, and never trained. Gradients reach the rows and no further.
    On a CPU the C++ kernel reads the packed weights as they are; elsewhere they are unpacked expert by expert.

    Of an expert with at most 24 rows the kernel rounds the inputs of both projections to int8 as well, if tokens are
    in bf16, weights have 8 bits or 4 in groups of 64, and the processor multiplies int8 (AVX-512 with VNNI, and with
    bf16 for 8 bits, or AVX2 without AVX-512): 64 neighbours share a scale, their largest over 127. For normally
    distributed tokens an output then differs by 1.5 % of its length from the definition's, more than 8 bits of the
    weights cost and less than 4 do. Otherwise inputs stay as they are.

    Args:
        num_experts: E.
        width: D.
        hidden: H.
        activation: between the projections.
        width_out: O, D if not given.
        bits: 8 or 4.
        group_size: weights that share a scale, 32 or 64; of 4 bits only.
        up_bias: give the up projection a bias.
        down_bias: give the down projection a bias.

    Raises:
        ValueError: other bits or groups.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        activation: Activation,
        *,
        width_out: int | None = None,
        bits: int = 8,
        group_size: int = 64,
        up_bias: bool = False,
        down_bias: bool = False,
    ) -> None:
        super().__init__()
        if bits not in (8, 4) or group_size not in (32, 64):
            raise ValueError(
                f"weights of {bits} bits in groups of {group_size} are not supported; choose 8 or 4 bits, 32 or 64"
            )
        self.num_experts, self.hidden, self.activation = num_experts, hidden, activation
        self.up = Weights(num_experts, activation.projections * hidden, width, bits, group_size, up_bias)
        self.down = Weights(num_experts, width_out or width, hidden, bits, group_size, down_bias)

    def part(self, first: int, last: int) -> Quantized:
        """The experts `first` to `last - 1` alone."""
        return cut(self, first, last)

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """`down(activation(up(rows)))` with the dequantised weights."""
        return self.down(self.activation(self.up(rows, counts)), counts)

    def extra_repr(self) -> str:
        """Sizes and activation."""
        return f"experts={self.num_experts}, hidden={self.hidden}, activation={self.activation}"


def quantize(experts: Experts, bits: int = 8, group_size: int = 64) -> Quantized:
    """The same experts with weights of 8 bits (a scale per row) or 4 bits (a scale per group).

    Args:
        experts: feed-forward experts.
        bits: 8 or 4.
        group_size: weights that share a scale, 32 or 64; of 4 bits only.

    Raises:
        ValueError: the experts are not stacked feed-forward networks.
    """
    s: Stacked | None = experts.stacked
    if s is None:
        raise ValueError(
            f"{type(experts).__name__} cannot be quantised: it is not a stack of FFNs, or drops hidden "
            "units in training; quantise FFN experts, after model.eval()"
        )
    num_experts, width_out, hidden = s.down.shape
    with s.up.device:
        quantized = Quantized(
            num_experts,
            s.up.shape[-1],
            hidden,
            s.activation,
            width_out=width_out,
            bits=bits,
            group_size=group_size,
            up_bias=s.up_bias is not None,
            down_bias=s.down_bias is not None,
        )
    quantized.up.fill(s.up, s.up_bias)
    quantized.down.fill(s.down, s.down_bias)
    return quantized.train(experts.training)


def _filled(value: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Newly allocated memory, on a CPU in huge pages, where reading, the main cost, is fastest."""
    fresh = torch.empty(shape, dtype=dtype)
    return (in_huge_pages(fresh) if fresh.is_cpu and fresh.nbytes >= _HUGE else fresh).fill_(value)


def _not_zero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, 1.0, scales)


def _pack(numbers: Int[Tensor, "O D"]) -> Int[Tensor, "O bytes"]:
    """Four numbers below 16 in every two bytes."""
    a, b, c, d = numbers.unflatten(-1, (-1, 4, _QUARTER)).unbind(-2)  # each (O, blocks, 32)
    return torch.stack([a | b << 4, c | d << 4], dim=-1).flatten(1)


def _unpack(packed: Int[Tensor, "O bytes"]) -> Int[Tensor, "O D"]:
    low, high = packed.unflatten(-1, (-1, _QUARTER, 2)).unbind(-1)  # each (O, blocks, 32)
    return torch.stack([low & 15, low >> 4, high & 15, high >> 4], dim=-2).flatten(1)
