"""What the Engram of its authors, deepseek-ai/Engram, answers to the inputs of `claims/independent.py`.

python engram_authors.py INPUTS.npz ANSWERS.npz CHECKOUT

Their demo downloads a tokenizer to give ids of equal text one id; here every id is its own. It runs with one residual
stream, and the eps of the norm of values for those of keys and queries too.
"""

import subprocess
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class SameIds:
    """In place of their tokenizer: every id stays what it is."""

    def __init__(self, count: int) -> None:
        self.lookup_table = np.arange(count)

    def __len__(self) -> int:
        return len(self.lookup_table)

    def __call__(self, ids: Any) -> np.ndarray:
        return np.asarray(ids, dtype=np.int64)


def answer(given: dict[str, Tensor], demo: Any) -> dict[str, Tensor]:
    """Places in the tables, output and gradients."""
    settings, sizes = demo.engram_cfg, given["sizes"].tolist()
    demo.CompressedTokenizer = lambda tokenizer_name_or_path: SameIds(sizes[0])
    settings.engram_vocab_size, settings.max_ngram_size, settings.layer_ids = [sizes[1]] * (sizes[2] - 1), sizes[2], [1]
    settings.n_embed_per_ngram, settings.n_head_per_ngram, settings.kernel_size = sizes[3:]
    settings.pad_id = 0
    demo.backbone_config.hidden_size, demo.backbone_config.hc_mult = given["x"].shape[-1], 1
    memory = demo.Engram(1)
    memory.hash_mapping.layer_multipliers[1] = given["multipliers"].numpy()
    tensors = {
        "table": memory.multi_head_embedding.embedding.weight, "keys": memory.key_projs[0].weight,
        "values": memory.value_proj.weight, "conv": memory.short_conv.conv.weight,
        "norm_key": memory.norm1[0].weight, "norm_query": memory.norm2[0].weight,
        "norm_value": memory.short_conv.norms[0].weight,
    }  # fmt: skip
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(given[name])
        for projection in (memory.value_proj, memory.key_projs[0]):
            nn.init.zeros_(projection.bias)
    memory.norm1[0].eps = memory.norm2[0].eps = memory.short_conv.norms[0].eps
    x, ids = given["x"].clone().requires_grad_(), given["ids"].numpy()
    y = memory(x.unsqueeze(2), ids).squeeze(2)
    (y * given["direction"]).sum().backward()
    places = torch.from_numpy(memory.hash_mapping.hash(ids)[1]) + memory.multi_head_embedding.offsets
    answers = {"engram/places": places, "engram/y": y, "engram/grad x": x.grad}
    return answers | {f"engram/grad {name}": tensor.grad for name, tensor in tensors.items()}


if __name__ == "__main__":
    inputs, answers, checkout = sys.argv[1:]
    sys.path.insert(0, checkout)
    import engram_demo_v1

    found = answer({name: torch.from_numpy(value) for name, value in np.load(inputs).items()}, engram_demo_v1)
    commit = ["git", "-C", checkout, "rev-parse", "--short", "HEAD"]
    stated = subprocess.run(commit, capture_output=True, text=True).stdout.strip() or "unknown commit"
    np.savez(answers, version=stated, **{name: value.detach().numpy() for name, value in found.items()})
