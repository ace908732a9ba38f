"""Make a vision transformer sparse in its last layers, with experts that every image chooses as a whole."""

from functools import partial

import torch
from transformers import ViTConfig, ViTForImageClassification

from moeify import Recipe, record, sparsify
from moeify.find import last
from moeify.routers import TopK

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10)).eval()

sparsify(model, Recipe(where=last(2), num_experts=4, router=partial(TopK, k=2, per="sequence")))

images = torch.randn(3, 3, 32, 32)
with record(model) as decisions:
    logits = model(pixel_values=images).logits
print("logits", tuple(logits.shape))
for layer, decision in decisions.items():
    by_image = decision.choices.indices.view(3, -1, 2)  # (images, patches, k)
    print(layer, "experts of each image:", by_image[:, 0].tolist())
