"""Photographs of caltech101-64, small vision transformers, and how claims train and measure them."""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from common.rates import UNREPORTED, parted, rates_of
from common.training import Balancing
from torch import Tensor, nn

from moeify import record
from moeify.data.claim_files import data_file
from moeify.data.images import fitted, image_of
from moeify.flops import count
from moeify.layers import sparse_layers

BATCH = 64
PATCHES = 64
"""Of a photograph of 32 pixels a side."""


@dataclass(frozen=True)
class Images:
    """Pixels between -1 and 1, (images, channels, height, width), and the class of each."""

    pixels: Tensor
    labels: Tensor

    def __getitem__(self, chosen: Tensor) -> Images:
        return Images(self.pixels[chosen], self.labels[chosen])

    def __len__(self) -> int:
        return len(self.labels)


def photographs(part: str, size: int = 32, column: str = "label") -> Images:
    """The photographs of a part, 97 classes, or 11 where the column is `super`.

    Raises:
        ImportError: pyarrow or Pillow is not installed.
    """
    import pyarrow.parquet

    path = data_file(f"caltech101-64/{part}.parquet")
    rows = pyarrow.parquet.read_table(io.BytesIO(path.read_bytes()), columns=["image", column]).to_pylist()
    pixels = [fitted(image_of(row["image"], path.parent, path.name), size, 3) for row in rows]
    return Images(torch.stack(pixels).float() / 127.5 - 1, torch.tensor([row[column] for row in rows]))


def vit(*, size: int = 32, patch: int = 4, channels: int = 3, width: int = 64, labels: int = 97) -> nn.Module:
    """Four layers, from scratch."""
    config = transformers.ViTConfig(
        image_size=size, patch_size=patch, num_channels=channels, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=4, num_attention_heads=4, num_labels=labels, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def train(
    model: nn.Module,
    images: Images,
    steps: int,
    seed: int,
    rate: float,
    *,
    balancing: Balancing | None = None,
    inputs: Callable[[Images], Mapping[str, Tensor]] = lambda chosen: {},
) -> nn.Module:
    """AdamW with a warm-up of a tenth and a linear decay to nothing; returns the model, evaluating.

    Args:
        model: learns.
        images: of which every step draws 64.
        steps: of the optimizer.
        seed: of the batches.
        rate: the highest learning rate.
        balancing: a loss of the decisions of sparse layers; none by default.
        inputs: further inputs of the model.
    """
    dice = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1, anneal_strategy="linear")
    model.train()
    for _ in range(steps):
        step(model, images[torch.randint(len(images), (BATCH,), generator=dice)], balancing, inputs).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def step(
    model: nn.Module,
    images: Images,
    balancing: Balancing | None = None,
    inputs: Callable[[Images], Mapping[str, Tensor]] = lambda chosen: {},
) -> Tensor:
    """The loss of a batch."""
    given = {"pixel_values": images.pixels, "labels": images.labels, **inputs(images)}
    if balancing is None or not sparse_layers(model):
        return model(**given).loss
    with record(model) as decisions:
        loss = model(**given).loss
    return loss + torch.stack([balancing(routing) for routing in decisions.values()]).mean()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """In percent."""
    parts = [model(pixel_values=part).logits.argmax(-1) for part in images.pixels.split(BATCH)]
    return 100 * (torch.cat(parts) == images.labels).float().mean().item()


def compared(
    claim: str,
    arms: Mapping[str, Callable[[], nn.Module]],
    chosen: argparse.Namespace,
    *,
    balancing: Mapping[str, Balancing],
    inputs: Mapping[str, Callable[[Images], Mapping[str, Tensor]]] | None = None,
    measure: Callable[[str, nn.Module, Images], Mapping[str, str]] | None = None,
) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
    """Train every arm from every seed on the same photographs, on one thread, each at its own rate.

    Rates are chosen by a tenth of the photographs that are learnt otherwise.

    Args:
        claim: whose arms they are.
        arms: how each model is built.
        chosen: what `options` returned.
        balancing: the loss of the decisions of arms that have one.
        inputs: of arms that have further ones in training.
        measure: further columns of a row, of an arm's trained model and the test photographs.

    Returns:
        Of each arm the accuracy on test photographs by seed, in percent; and a row for every run.
    """
    torch.set_num_threads(1)
    learnt, unseen = photographs("train"), photographs("test")
    rest, most = (learnt[at] for at in parted(len(learnt)))

    def run(arm: str, seed: int, rate: float, images: Images) -> nn.Module:
        torch.manual_seed(seed)
        further = {"inputs": inputs[arm]} if inputs and arm in inputs else {}
        return train(arms[arm](), images, chosen.steps, seed, rate, balancing=balancing.get(arm), **further)

    rates = rates_of(claim, arms, chosen, lambda arm, rate: 100 - accuracy(run(arm, UNREPORTED, rate, most), rest))
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    rows = []
    for seed in chosen.seeds:
        for arm, rate in rates.items():
            began = time.process_time()
            model = run(arm, seed, rate, learnt)
            found[arm].append(accuracy(model, unseen))
            counted = count(model, PATCHES + 1)
            rows.append({
                "hardware": chosen.hardware, "arm": arm, "seed": seed, "steps": chosen.steps,
                "images": chosen.steps * BATCH, "rate": rate, "accuracy": f"{found[arm][-1]:.2f}",
                "parameters": counted.parameters, "flops": counted.flops,
                **(measure(arm, model, unseen) if measure else {}), "cpu_seconds": f"{time.process_time() - began:.0f}",
            })  # fmt: skip
            print(*rows[-1].values(), flush=True)
    return found, rows
