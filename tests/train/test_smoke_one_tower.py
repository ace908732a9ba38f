"""LIMoE's one tower learns the captions of real emoji, whose tokens and patches compete for the same experts."""

import io
import runpy
from pathlib import Path
from statistics import fmean

import pytest
import torch
from torch.nn import functional as F

from moeify import record, sparsify
from moeify.data import ByteTokenizer
from moeify.data.claim_files import data_file
from moeify.sparsify import recipes

EXAMPLE = Path(__file__).parents[2] / "examples" / "one_tower_two_modalities.py"


@pytest.fixture(scope="module")
def emoji():
    from PIL import Image
    from pyarrow import parquet

    try:
        rows = parquet.read_table(data_file("emoji-captions/train.parquet"), columns=["image", "name"]).to_pylist()
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    pixels = [
        torch.frombuffer(bytearray(Image.open(io.BytesIO(row["image"])).convert("RGB").tobytes()), dtype=torch.uint8)
        for row in rows[:320]
    ]
    images = torch.stack(pixels).view(-1, 64, 64, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.avg_pool2d(images, 4), [row["name"] for row in rows[:320]]


@pytest.mark.data
def test_images_find_their_captions(emoji):
    images, names = emoji
    example, tokenizer = runpy.run_path(str(EXAMPLE)), ByteTokenizer()

    def batch(chosen):
        captions = [{"input_ids": tokenizer.encode(names[i])[:48]} for i in chosen.tolist()]
        return images[chosen], tokenizer.pad(captions)

    probe = example["batch_of"](*batch(torch.arange(4)))
    model = sparsify(example["Tower"](channels=3, patches=64), recipes["limoe"], probe=probe, verbose=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        pictures, captions = batch(torch.randint(len(names), (32,)))
        loss = example["contrast"](model, pictures, captions, torch.arange(32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert fmean(losses[-10:]) < fmean(losses[:10]) - 0.3
    with record(model.eval()) as decisions:
        model(*example["batch_of"](*batch(torch.arange(32))))
    for routing in decisions.values():
        assert {0, 1} == set(routing.evidence.label.tolist())
