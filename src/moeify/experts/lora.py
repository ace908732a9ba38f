"""LoRA experts: low-rank adapters beside a frozen linear layer or inside a frozen feed-forward network."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from moeify.experts.base import Experts, cut, hold_activation
from moeify.exportable import expert_of_rows, repeat_for_rows
from moeify.kernels import grouped_linear
from moeify.kernels.stacked import Activation


class LoRA(Experts):
    """E low-rank adapters `s_j · B_j A_j x` (LoRA, arXiv 2106.09685), computed as `B (A x)` for all experts together.

    Beside `shared=frozen` of the linear layer they adapt they are the experts of PHATGOOSE, Arrow, MoCLE and LoRAMoE.
    Adapters of different ranks share one stack: the smaller ones are padded with zeros, which changes nothing.

    Args:
        num_experts: E.
        width: D.
        width_out: O, D if not given.
        rank: r, of the largest.
        scale: s; `alpha / rank` where a paper gives alpha.
        dropout: probability of dropping an input in training.
        names: of the experts, in order; their numbers if not given.

    Attributes:
        lora_A: (E, r, D).
        lora_B: (E, O, r); starts at zero, so that the layer starts as the linear layer beside it.
        scale: s of every expert, (E,) in fp32.

    Raises:
        ValueError: a rank below 1, or not one name per expert.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        width_out: int | None = None,
        *,
        rank: int = 8,
        scale: float = 1.0,
        dropout: float = 0.0,
        names: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank={rank} must be a whole number; choose rank >= 1")
        self.names = tuple(map(str, range(num_experts))) if names is None else tuple(names)
        if len(self.names) != num_experts:
            raise ValueError(f"{len(self.names)} names for {num_experts} experts; give one name per expert")
        self.num_experts, self.width, self.rank = num_experts, width, rank
        self.width_out = width if width_out is None else width_out
        self.lora_A = nn.Parameter(torch.empty(num_experts, rank, width).uniform_(-1, 1) / math.sqrt(width))
        self.lora_B = nn.Parameter(torch.zeros(num_experts, self.width_out, rank))
        self.register_buffer("scale", torch.full((num_experts,), scale, dtype=torch.float32))
        self.dropout = nn.Dropout(dropout)

    def part(self, first: int, last: int) -> LoRA:
        """The experts `first` to `last - 1` alone, with their names."""
        part = cut(self, first, last)
        part.names = self.names[first:last]
        return part

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """`s_j · B_j A_j x`, each row by its own expert."""
        if torch.compiler.is_exporting():
            return self._masked(rows, counts)
        low = grouped_linear(self.dropout(rows), self.lora_A, counts)
        scale = repeat_for_rows(self.scale, counts, rows.shape[0])
        return grouped_linear(low * scale.to(low.dtype).unsqueeze(-1), self.lora_B, counts)

    def _masked(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """All adapters as one of rank E r, of which every row keeps its own part: few operators, for a graph."""
        experts = torch.arange(self.num_experts, device=rows.device)
        own = expert_of_rows(counts, rows.shape[0]).unsqueeze(1) == experts  # (R, E)
        low = F.linear(rows.to(self.lora_A.dtype), self.lora_A.flatten(0, 1)).unflatten(1, (self.num_experts, -1))
        low = low * (own * self.scale).to(low.dtype).unsqueeze(2)
        return F.linear(low.flatten(1), self.lora_B.transpose(0, 1).flatten(1))

    @torch.no_grad()
    def delta(self, expert: int) -> Float[Tensor, "O D"]:
        """What one expert adds to the weight beside it: `s · B A`, in fp32."""
        return self.scale[expert].float() * (self.lora_B[expert].float() @ self.lora_A[expert].float())

    def extra_repr(self) -> str:
        """Sizes, and the names."""
        names = "" if self.names == tuple(map(str, range(self.num_experts))) else f", names={', '.join(self.names)}"
        return f"experts={self.num_experts}, {self.width} -> {self.rank} -> {self.width_out}{names}"


class LoRAFFN(Experts):
    """E feed-forward networks that are one frozen network with low-rank changes to both its projections (MixLoRA).

        E_j(x) = (W₂ + s B₂ⱼ A₂ⱼ) activation((W₁ + s B₁ⱼ A₁ⱼ) x)                       arXiv 2404.15159, equation 5

    Args:
        up: the up projection of the network, gate and up side by side if `activation` is gated.
        down: the down projection.
        activation: between the projections.
        up_lora: what the experts add to the up projection.
        down_lora: what they add to the down projection.
    """

    def __init__(self, up: nn.Linear, down: nn.Linear, activation: Activation, up_lora: LoRA, down_lora: LoRA) -> None:
        super().__init__()
        self.num_experts = up_lora.num_experts
        self.up, self.down, self.activation = up, down, activation
        hold_activation(self, activation)
        self.up_lora, self.down_lora = up_lora, down_lora

    def part(self, first: int, last: int) -> LoRAFFN:
        """The experts `first` to `last - 1` alone, around the same network."""
        return cut(self, first, last)

    def common_modules(self) -> tuple[nn.Module, ...]:
        """Both projections of the network."""
        return self.up, self.down

    def forward(self, rows: Float[Tensor, "R D"], counts: Int[Tensor, "E"]) -> Float[Tensor, "R O"]:
        """The network, each row with the changes of its own expert."""
        hidden = self.activation(self.up(rows) + self.up_lora(rows, counts))
        return self.down(hidden) + self.down_lora(hidden, counts)
