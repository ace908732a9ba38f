"""Three people adapt one small model with PEFT, each to texts of their own; a fourth composes what they made.

Needs `pip install moeify[adapters]`. PEFT makes the adapters here; composing, saving and loading them does without.
"""

import copy
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from moeify import from_adapters, load_adapters, save_adapters
from moeify.compose import save_gates
from moeify.data.corpus import build_corpus
from moeify.routers import Phatgoose, Uniform
from moeify.train import train_gates

torch.manual_seed(0)
corpus = build_corpus(cap=100_000)  # text that came with Python and torch, by domain
domains = [name for name in ("cpp-headers", "english-docs", "licences", "py-stdlib") if name in corpus.train][:3]


def batch(text, size=8, length=64):
    """Pieces of a text at random, as the arguments of a language model that reads bytes."""
    starts = torch.randint(len(text) - length, (size,)).tolist()
    ids = torch.tensor([list(text[start : start + length]) for start in starts])
    return {"input_ids": ids, "labels": ids}


def train(model, text, steps, lr):
    """A plain loop over the parameters that learn."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch(text)).loss.backward()
        optimizer.step()


@torch.no_grad()
def losses(model):
    """The loss on the held-out text of every domain, in nats per byte."""
    model.eval()
    torch.manual_seed(1)  # the same probe for all
    return [model(**batch(corpus.validation[name], size=32)).loss.item() for name in domains]


# the base that everybody has
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))
train(base, b"".join(corpus.train[name] for name in domains), steps=80, lr=5e-3)
table = {"base": losses(base)}

# what each of the three does, alone: an adapter with PEFT, then a gate for it
for name in domains:
    folder = Path("adapters") / name
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    train(adapted, corpus.train[name], steps=40, lr=1e-2)
    adapted.save_pretrained(folder)
    table[f"adapter {name}"] = losses(adapted)

    alone = from_adapters(copy.deepcopy(base), {name: folder}, Uniform, verbose=False)
    save_gates(train_gates(alone, [batch(corpus.train[name]) for _ in range(20)], steps=20), folder)

# what the fourth does: no training, and no text of the others
folders = {name: Path("adapters") / name for name in domains}
library = from_adapters(copy.deepcopy(base), folders, Phatgoose)
table["all three, routed"] = losses(library)
table["all three, averaged"] = losses(from_adapters(copy.deepcopy(base), folders, Uniform, verbose=False))

print(f"{'held-out loss':26}" + "".join(f"{name:>14}" for name in domains) + f"{'mean':>10}")
for who, row in table.items():
    print(f"{who:26}" + "".join(f"{loss:14.3f}" for loss in row) + f"{sum(row) / len(row):10.3f}")

save_adapters(library, "library")  # one folder for each adapter, which PEFT reads too
again = load_adapters(copy.deepcopy(base).eval(), "library")
ids = batch(corpus.validation[domains[0]])["input_ids"]
assert torch.equal(again(ids).logits, library(ids).logits)
print("saved to 'library', loaded again: the outputs are equal")
