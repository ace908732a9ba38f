"""Kill a process that saves two models over each other at random moments, and load what is left.

    python tests/nightly/saves.py --kills 500

Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

from moeify import Recipe, load, save
from moeify.routers import TopK
from moeify.sparsify import fresh, sparsify
from plain_models import blocks, output

X = torch.randn(2, 5, 8)


def model(k: int) -> nn.Module:
    """One of two models whose files have equal shapes."""
    torch.manual_seed(k)
    recipe = Recipe(num_experts=3, experts=fresh, router=partial(TopK, k=k))
    return sparsify(nn.Sequential(*blocks(2)), recipe, verbose=False).eval()


def save_without_end(models: list[nn.Module], folder: Path, start: int) -> None:
    for i in itertools.count(start):
        save(models[i % 2], folder, max_shard_size=("1KB", "5GB")[i // 2 % 2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, seen = random.Random(options.seed), Counter[str]()
    models = [model(k) for k in (2, 3)]
    expected: list[Tensor] = [output(each, (X,)) for each in models]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save(models[0], folder)
        for kill in range(1, options.kills + 1):
            arguments = (models, folder, chance.randrange(4))
            process = multiprocessing.get_context("fork").Process(target=save_without_end, args=arguments)
            process.start()
            time.sleep(chance.uniform(0.05, 0.6))
            process.kill()
            process.join()
            seen["committed and not yet in place"] += (folder / ".moeify-commit").is_dir()
            found = output(load(folder, model=nn.Sequential(*blocks(2))), (X,))
            if not any(torch.equal(found, each) for each in expected):
                raise SystemExit(f"after {kill} kills the folder holds neither model: {folder}")
            seen["one" if torch.equal(found, expected[0]) else "other"] += 1
    print(json.dumps({"kills": options.kills} | seen))


if __name__ == "__main__":
    main()
