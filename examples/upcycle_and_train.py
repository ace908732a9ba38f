"""Upcycle a small Llama and train it on the text that came with Python and torch."""

import json
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from moeify import Recipe, sparsify
from moeify.balance import Sign
from moeify.data import ByteTokenizer, blocks
from moeify.data.corpus import build_corpus
from moeify.routers import TopK
from moeify.sparsify import copies
from moeify.train import SparseArguments, SparseTrainer

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=ByteTokenizer.vocab_size, **sizes))

recipe = Recipe(
    num_experts=4,
    router=partial(TopK, k=2, selection_bias=True),
    experts=partial(copies, drop=0.5),  # half of every copy's hidden units start anew, so that the copies differ
)
sparsify(model, recipe)

train, validation = blocks(build_corpus(cap=100_000), ByteTokenizer(), length=64)
folder = Path("runs/upcycled")
arguments = TrainingArguments(
    output_dir=str(folder), max_steps=20, per_device_train_batch_size=8, learning_rate=3e-3,
    logging_steps=5, save_steps=10, report_to="none", use_cpu=True, disable_tqdm=True,
)  # fmt: skip
sparse = SparseArguments(balance=1e-2, z=1e-3, controller=Sign(rate=1e-2))
trainer = SparseTrainer(model, arguments, train_dataset=train, sparse=sparse)
trainer.train()

for line in (folder / "metrics.jsonl").read_text().splitlines():
    log = json.loads(line)
    print(f"step {log['step']}: loss {log['loss']:.3f}, balance {log['balance']:.3f}, load {log['load_entropy']:.3f}")
