"""Dense models that went their own ways from one base, to be merged into a sparse one."""

import copy
from functools import partial

import torch
from torch import nn

from moeify import merge_models
from plain_models import Block, Gated, Tied, encoder
from tiny_models import DENSE, inputs, tokens, widened


def plain(make):
    return lambda: make().eval()


MODELS = {name: DENSE[name] for name in ("llama", "phi3", "gpt2", "opt", "t5", "t5_gated", "bert", "vit")} | {
    "plain": plain(Tied),
    "plain with biases": plain(lambda: nn.Sequential(nn.LayerNorm(8), *[Block(Gated(bias=True)) for _ in range(2)])),
    "torch's encoder": plain(lambda: encoder()),
}


def given(model):
    if hasattr(model, "config"):
        return inputs(model)
    if isinstance(model, Tied):
        return (tokens() % 20,)
    return (torch.randn(2, 5, 8 if isinstance(model, nn.Sequential) else 16),)


@torch.no_grad()
def branches(kind: str, number: int = 3) -> list[nn.Module]:
    """Models that have gone their own ways from one base."""
    base = widened(MODELS[kind]())
    found = [copy.deepcopy(base) for _ in range(number)]
    for model in found:
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return found


merge = partial(merge_models, verbose=False)


def same(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)
