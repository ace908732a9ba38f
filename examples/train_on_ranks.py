"""Train a sparse model on all processes of torchrun, sharded as `moeify plan` says; alone it runs on one process.

moeify plan MODEL --cluster cluster.toml --emit transformers > plan.json
torchrun --nproc-per-node 4 train_on_ranks.py
"""

import json
from pathlib import Path

import torch
import transformers
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from moeify import Recipe, sparsify
from moeify.parallel import distribute
from moeify.train import SparseArguments, SparseTrainer

file = Path("plan.json")
plan = json.loads(file.read_text()) if file.is_file() else {"distributed_config": {}, "training_arguments": {}}

transformers.set_seed(0)  # every process makes the same model, and keeps its part of it
dense = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
    )
)  # fmt: skip
model = distribute(sparsify(dense, Recipe(num_experts=8)), plan["distributed_config"])
held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())

arguments = TrainingArguments(
    "run", max_steps=3, logging_steps=1, save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(),
    **plan["training_arguments"],
)  # fmt: skip
ids = torch.randint(256, (256, 16), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": row} for (row,) in TensorDataset(ids)]
trainer = SparseTrainer(model, arguments, train_dataset=data, sparse=SparseArguments(balance=0.01))
trainer.train()
last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
if trainer.is_world_process_zero():
    print(f"{trainer.args.world_size} processes, this one holds {held:,} of {model.num_parameters():,} parameters")
    print(f"step 3: loss {last['loss']:.4f}, balance {last['balance']:.3f}")

if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
