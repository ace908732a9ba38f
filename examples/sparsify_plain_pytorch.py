"""Make plain PyTorch sparse: torch's own transformer encoder, and a tower of linear maps as recommenders have."""

from functools import partial

import torch
from torch import nn

from moeify import MoE, Recipe, sparsify
from moeify.routers import TopK
from moeify.sparsify import copies, fresh

torch.manual_seed(0)
encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), num_layers=2)
sparsify(encoder, Recipe(num_experts=4, experts=partial(fresh, granularity=2)))
padding = torch.zeros(2, 10, dtype=torch.bool)
padding[1, 6:] = True
answers = encoder(torch.randn(2, 10, 32), src_key_padding_mask=padding)
print("encoder", tuple(answers.shape))

tower = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))
sparsify(tower, Recipe(num_experts=4, router=partial(TopK, k=2), experts=partial(copies, noise=0.1)))
print("tower", tuple(tower(torch.randn(8, 16)).shape))

print([name for model in (encoder, tower) for name, part in model.named_modules() if isinstance(part, MoE)])
