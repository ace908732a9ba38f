"""Make a vision transformer sparse by Soft MoE or by V-MoE, and let it read real digits.

The digits are the 1,797 scans of 8 x 8 pixels that scikit-learn brings along (pip install scikit-learn).
"""

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from moeify import record, sparsify
from moeify.flops import count
from moeify.losses import importance
from moeify.sparsify import recipes

PATCHES = 16
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
unseen, to_learn = order[:400], order[400:]
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}

for name in ("soft", "vmoe"):
    torch.manual_seed(0)
    config = ViTConfig(**sizes, image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.1)
    model = ViTForImageClassification(config).train()
    sparsify(model, recipes[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(3):
        for batch in to_learn[torch.randperm(len(to_learn))].split(48):
            with record(model) as decisions:
                loss = F.cross_entropy(model(pixel_values=images[batch]).logits, labels[batch])
            balance = sum(importance(decision) for decision in decisions.values() if decision.scores is not None)
            optimizer.zero_grad()
            (loss + 0.01 * balance).backward()
            optimizer.step()

    with torch.no_grad(), record(model.eval()) as decisions:
        right = model(pixel_values=images[unseen]).logits.argmax(-1) == labels[unseen]
    print(f"{name}: reads {right.float().mean():.1%} of {len(unseen)} unseen digits")
    print(count(model, tokens=PATCHES + 1))
    for layer, decision in decisions.items():
        share = decision.counts / decision.counts.sum()
        print(f"  {layer}: share of the rows per expert", *(f"{s:.2f}" for s in share.tolist()))
