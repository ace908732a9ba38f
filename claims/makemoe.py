"""The teaching implementation makeMoE (AviSoori1x/makeMoE), its configuration rebuilt from our parts.

Reported there: 8.996545 M parameters, validation loss 1.7508 after 5,000 steps on the characters of tiny Shakespeare.
Reproduced if ours ends within 0.03 of that. Differences: our router adds no noise in evaluation, and has no bias.

    python claims/makemoe.py            about 15 minutes on one core; appends to claims/results/makemoe.csv
"""

from __future__ import annotations

import argparse
import gzip
import json
import time

import torch
from results import append
from torch import Tensor, nn
from torch.nn import functional as F

from moeify import MoE
from moeify.data.claim_files import data_file
from moeify.experts import FFN, Plain
from moeify.routers import NoisyTopK

WIDTH, HEADS, LAYERS, EXPERTS, K, BLOCK, BATCH, DROPOUT = 128, 8, 8, 8, 2, 32, 16, 0.1
REPORTED, ALLOWED = 1.7508, 0.03


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.moe_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(DROPOUT)
        self.moe = MoE(
            NoisyTopK(WIDTH, EXPERTS, k=K), FFN(EXPERTS, WIDTH, 4 * WIDTH, activation=Plain(F.relu), bias=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        dropout = DROPOUT if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.moe(self.moe_norm(x)))


class Model(nn.Module):
    def __init__(self, characters: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, WIDTH)
        self.positions = nn.Embedding(BLOCK, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
            if isinstance(module, FFN | NoisyTopK):
                for name, weight in module.named_parameters():
                    if not name.endswith("bias"):
                        nn.init.normal_(weight, std=(2 / weight.shape[-1]) ** 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.characters(ids) + self.positions.weight[: ids.shape[1]]
        return self.head(self.norm(self.layers(x)))


def tiny_shakespeare() -> str:
    """The text in its original order: the documents of both parts of the domain, by number."""
    documents = {}
    for part in ("train", "validation"):
        with gzip.open(data_file(f"text-domains/{part}.jsonl.gz"), "rt") as lines:
            rows = map(json.loads, lines)
            documents |= {row["doc"]: row["text"] for row in rows if row["domain"] == "drama"}
    return "\n\n".join(documents[name] for name in sorted(documents))


def batch(ids: Tensor) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(ids) - BLOCK, (BATCH,))
    blocks = torch.stack([ids[s : s + BLOCK + 1] for s in starts])
    return blocks[:, :-1], blocks[:, 1:]


def loss(model: Model, ids: Tensor) -> Tensor:
    x, y = batch(ids)
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def evaluate(model: Model, ids: Tensor, batches: int = 400) -> float:
    model.eval()
    mean = sum(loss(model, ids).item() for _ in range(batches)) / batches
    model.train()
    return mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--hardware", default="unknown", help="the name of the hardware in the rows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    text = tiny_shakespeare()
    alphabet = sorted(set(text))
    ids = torch.tensor([alphabet.index(c) for c in text])
    train, validation = ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]
    model = Model(len(alphabet))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    started = time.perf_counter()
    for step in range(options.steps):
        optimizer.zero_grad()
        value = loss(model, train)
        value.backward()
        optimizer.step()
        if step % 500 == 499:
            seconds, held_out = time.perf_counter() - started, evaluate(model, validation, 50)
            print(f"step {step + 1}  train {value.item():.4f}  validation {held_out:.4f}  {seconds:.0f} s", flush=True)
    final = evaluate(model, validation)
    verdict = "reproduced" if abs(final - REPORTED) <= ALLOWED else "failed"
    parameters = sum(p.numel() for p in model.parameters())
    append("makemoe", {
        "hardware": options.hardware, "characters": len(ids), "parameters": parameters, "steps": options.steps,
        "seed": options.seed,
        "validation_loss": f"{final:.4f}", "reported": REPORTED, "result": verdict,
    })  # fmt: skip
    print(f"{parameters:,} parameters, validation loss {final:.4f} against {REPORTED} reported: {verdict}")


if __name__ == "__main__":
    main()
