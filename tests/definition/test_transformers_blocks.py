"""The sparse blocks of transformers are compositions of ours: same output, same gradients."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig

from moeify import MoE
from moeify.experts import FFN, ClampedGlu, Plain
from moeify.routers import Capacity, ExpertGroups, TopK, sigmoid

WIDTH, HIDDEN, EXPERTS, K = 32, 16, 8, 2
Layout = Callable[[Tensor], Tensor]


@dataclass
class Twins:
    """Their block, our layer, and which of our parameters is which of theirs, laid out in what way."""

    theirs: nn.Module
    ours: MoE
    pairs: list[tuple[nn.Parameter, list[nn.Parameter], Callable[[list[Tensor]], Tensor]]]

    def copy_weights(self) -> Twins:
        with torch.no_grad():
            for ours, theirs, layout in self.pairs:
                ours.copy_(layout([t.detach() for t in theirs]))
        return self


def _only(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def _transposed(tensors: list[Tensor]) -> Tensor:
    return tensors[0].transpose(1, 2)


def _block(family: str, name: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    settings = AutoConfig.for_model(family, **{"hidden_size": WIDTH, "num_experts_per_tok": K} | config)
    settings._experts_implementation = "eager"
    block = getattr(module, name)(settings)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def _same_layout(ours: nn.Module, theirs: nn.Module) -> Iterator[tuple]:
    by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        yield parameter, [by_name[name]], _only


def _softmax_block(family: str, name: str, *, normalize: bool = True, **config: Any) -> Twins:
    theirs = _block(family, name, **config)
    ours = MoE(TopK(WIDTH, EXPERTS, k=K, normalize=normalize), FFN(EXPERTS, WIDTH, HIDDEN))
    pairs = [*_same_layout(ours.router, theirs.gate), *_same_layout(ours.experts, theirs.experts)]
    return Twins(theirs, ours, pairs).copy_weights()


def _mixtral() -> Twins:
    return _softmax_block("mixtral", "MixtralSparseMoeBlock", num_local_experts=EXPERTS, intermediate_size=HIDDEN)


def _qwen3_moe() -> Twins:
    sizes = {"num_experts": EXPERTS, "moe_intermediate_size": HIDDEN}
    return _softmax_block("qwen3_moe", "Qwen3MoeSparseMoeBlock", norm_topk_prob=True, **sizes)


def _olmoe() -> Twins:
    sizes = {"num_experts": EXPERTS, "intermediate_size": HIDDEN, "num_attention_heads": 4}
    return _softmax_block("olmoe", "OlmoeSparseMoeBlock", normalize=False, norm_topk_prob=False, **sizes)


def _deepseek_v3() -> Twins:
    theirs = _block(
        "deepseek_v3", "DeepseekV3MoE", n_routed_experts=EXPERTS, moe_intermediate_size=HIDDEN,
        n_group=4, topk_group=2, n_shared_experts=2, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    groups = ExpertGroups(4, 2, "top2")
    router = TopK(WIDTH, EXPERTS, k=K, score=sigmoid, selection_bias=True, expert_groups=groups, scale=2.5)
    bias = (torch.randn(EXPERTS) * 0.1).bfloat16()
    for buffer in (router.selection_bias, theirs.gate.e_score_correction_bias):
        buffer.copy_(bias)
    ours = MoE(router, FFN(EXPERTS, WIDTH, HIDDEN), shared=copy.deepcopy(theirs.shared_experts))
    pairs = [
        *_same_layout(router, theirs.gate),
        *_same_layout(ours.experts, theirs.experts),
        *_same_layout(ours.shared, theirs.shared_experts),
    ]
    return Twins(theirs, ours, pairs).copy_weights()


class _Answer(nn.Module):
    """Their block without the router scores that it returns beside its output."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)[0]


def _gpt_oss() -> Twins:
    theirs = _block("gpt_oss", "GptOssMLP", num_local_experts=EXPERTS, intermediate_size=HIDDEN)
    with torch.no_grad():
        theirs.experts.gate_up_proj.mul_(10)  # so that many values are clamped
    ours = MoE(TopK(WIDTH, EXPERTS, k=K, bias=True), FFN(EXPERTS, WIDTH, HIDDEN, activation=ClampedGlu(), bias=True))
    pairs = [
        *_same_layout(ours.router, theirs.router),
        *(
            (mine, [getattr(theirs.experts, name)], _only if name.endswith("bias") else _transposed)
            for name, mine in ours.experts.named_parameters()
        ),
    ]
    return Twins(_Answer(theirs), ours, pairs).copy_weights()


def _switch(slots: int) -> Twins:
    theirs = _block(
        "switch_transformers", "SwitchTransformersSparseMLP",
        d_model=WIDTH, d_ff=HIDDEN, num_experts=EXPERTS, expert_capacity=slots, dropout_rate=0.0,
        router_jitter_noise=0.0, router_bias=False,
    )  # fmt: skip
    router = Capacity(TopK(WIDTH, EXPERTS, k=1, normalize=False), capacity=lambda factor, tokens, experts, k: slots)
    ours = MoE(router, FFN(EXPERTS, WIDTH, HIDDEN, activation=Plain(F.relu)))
    experts = list(theirs.experts.values())
    pairs = [
        (router.router.weight, [theirs.router.classifier.weight], _only),
        (ours.experts.up_proj, [expert.wi.weight for expert in experts], torch.stack),
        (ours.experts.down_proj, [expert.wo.weight for expert in experts], torch.stack),
    ]
    return Twins(theirs, ours, pairs).copy_weights()


BLOCKS = {
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "switch, nothing dropped": partial(_switch, slots=64),
}


def _tokens(batch: int = 3, length: int = 10) -> Tensor:
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1))


def _run(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Answer and input gradient; parameter gradients are left in the module."""
    x = x.clone().requires_grad_()
    y = module(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    y.backward(upstream)
    return y.detach(), x.grad


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _assert_twins_agree(twins: Twins, x: Tensor, close: Callable[[Tensor, Tensor], None]) -> None:
    (y, dx), (their_y, their_dx) = _run(twins.ours, x), _run(twins.theirs, x)
    close(y, their_y)
    close(dx, their_dx)
    assert len(twins.pairs) == len(list(twins.ours.parameters()))
    for ours, theirs, layout in twins.pairs:
        assert ours.grad is not None
        close(ours.grad, layout([_gradient(t) for t in theirs]))


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_transformers_is_a_composition_of_ours(name: str):
    close = partial(torch.testing.assert_close, atol=2e-4, rtol=1e-4)
    _assert_twins_agree(BLOCKS[name](), _tokens(), close)


def _close_in_bf16(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert (ours.float() - theirs.float()).norm() < 0.02 * theirs.float().norm()


def test_deepseek_is_a_composition_of_ours_in_bf16():
    twins = _deepseek_v3()
    twins.theirs.bfloat16()
    twins.ours.bfloat16()
    _assert_twins_agree(twins, _tokens().bfloat16(), _close_in_bf16)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="transformers itself dropped other tokens then"
)
def test_switch_drops_the_same_tokens_of_a_sequence():
    twins = _switch(slots=2)
    x = _tokens(batch=1, length=40)
    dropped = (twins.ours(x) == 0).all(-1)
    assert 0 < dropped.sum() < 40
    assert torch.equal(dropped, (twins.theirs(x) == 0).all(-1))
    _assert_twins_agree(twins, x, partial(torch.testing.assert_close, atol=2e-4, rtol=1e-4))
