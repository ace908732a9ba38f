"""Make a language model sparse, look at what its routers decide, and store it."""

from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moeify import Recipe, load, record, save, sparsify
from moeify.routers import TopK

torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).eval()
tokens = torch.randint(256, (2, 16))
before = model(tokens).logits

sparsify(model, Recipe(num_experts=4, router=partial(TopK, k=2)))
print(f"largest change of a logit: {(model(tokens).logits - before).abs().max():.1e}")

with record(model) as decisions:
    model(tokens)
for layer, decision in decisions.items():
    print(layer, decision.counts.tolist())

folder = Path("runs/sparse-llama")
save(model, folder)
again = load(folder)
print(f"the same after loading: {torch.equal(again(tokens).logits, model(tokens).logits)}")
