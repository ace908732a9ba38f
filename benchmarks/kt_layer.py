"""The experts of a layer in kt-kernel, the CPU kernels of KTransformers: a peer in bf16, where it is installed."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from moeify.experts import FFN

IS_INSTALLED = importlib.util.find_spec("kt_kernel") is not None
MOST_TOKENS = 8192  # of a call


class KtLayer:
    """FFN experts in bf16, gated by silu, in kt-kernel's layout: a copy of the weights.

    Args:
        experts: the experts.
        k: experts of a token.
    """

    def __init__(self, experts: FFN, k: int) -> None:
        from kt_kernel import KTMoEWrapper  # pyrefly: ignore[missing-import]

        num_experts, width, hidden = experts.down_proj.shape
        with tempfile.TemporaryDirectory() as folder, _unpinned():
            save_file(dict(_named(experts)), Path(folder) / "model.safetensors")
            self.wrapper = KTMoEWrapper(
                layer_idx=0, num_experts=num_experts, num_experts_per_tok=k, hidden_size=width,
                moe_intermediate_size=hidden, gpu_experts_mask=None, cpuinfer_threads=torch.get_num_threads(),
                threadpool_count=1, weight_path=folder, chunked_prefill_size=MOST_TOKENS, method="BF16",
            )  # fmt: skip
            self.wrapper.load_weights(torch.arange(num_experts))

    def __call__(self, x: Float[Tensor, "T D"], index: Int[Tensor, "T K"], weight: Float[Tensor, "T K"]) -> Tensor:
        """The weighted sum of every token's expert outputs."""
        out, count, weight = torch.empty_like(x), torch.tensor([len(x)], dtype=torch.int32), weight.float()
        addresses = (tensor.data_ptr() for tensor in (index, weight, x, out))
        self.wrapper.cpu_infer.submit(
            self.wrapper.moe.forward_task(count.data_ptr(), index.shape[1], *addresses, False)
        )
        self.wrapper.cpu_infer.sync()
        return out


def _named(experts: FFN) -> Iterator[tuple[str, Tensor]]:
    """The matrices under the names of a DeepSeek checkpoint, from which kt-kernel reads them."""
    for number, (up, down) in enumerate(zip(experts.gate_up_proj.detach(), experts.down_proj.detach(), strict=True)):
        for name, matrix in zip(("gate", "up", "down"), (*up.chunk(2), down), strict=True):
            yield f"model.layers.0.mlp.experts.{number}.{name}_proj.weight", matrix.contiguous()


@contextmanager
def _unpinned() -> Iterator[None]:
    """Buffers are made without CUDA's pinned memory, which kt-kernel asks for and a machine without CUDA lacks."""

    def zeros(*shape: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return made(*shape, **options)

    made = torch.zeros
    with patch.object(torch, "zeros", zeros):
        yield
