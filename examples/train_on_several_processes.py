"""Train a sparse model on several processes: torchrun --nproc-per-node 2 examples/train_on_several_processes.py

Experts are divided among two processes, everything else is sharded by FSDP2, and biases balance the load of all.
Without torchrun the same program trains in one process.
"""

import os
from functools import partial

import torch
from torch import distributed, nn

from moeify import Recipe, sparsify
from moeify.balance import Sign, control
from moeify.parallel import clip_grad_norm_, shard
from moeify.routers import TopK, sigmoid
from moeify.sparsify import fresh

several = "RANK" in os.environ
if several:
    distributed.init_process_group("gloo")  # nccl on GPUs, after torch.cuda.set_device
rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)

torch.manual_seed(0)
model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), num_layers=2)
router = partial(TopK, k=2, score=sigmoid, selection_bias=True)
model = sparsify(model, Recipe(num_experts=8, router=router, experts=partial(fresh, granularity=2)), verbose=False)
if several:
    model = shard(model, ep=2 if ranks % 2 == 0 else 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
balance = control(model, optimizer, Sign(rate=1e-2))

generator = torch.Generator().manual_seed(1)
for step in range(6):
    batches = torch.randn(4, 8, 32, generator=generator)  # of all processes; each trains on its share
    x = batches.chunk(ranks)[rank]
    loss = (model(x) - x.roll(1, 1)).square().mean()
    loss.backward()
    norm = clip_grad_norm_(model, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if several:
        distributed.all_reduce(loss := loss.detach())
    if rank == 0:
        print(f"step {step}: loss {loss.item() / ranks:.6f}, gradient norm {norm.item():.6f}")

if several:
    distributed.destroy_process_group()
