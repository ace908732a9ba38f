"""`moeify.save` of a model that several processes hold writes what it writes of the same model in one process."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import distributed as dist

from moeify import Recipe, save, sparsify
from moeify.find import linears
from moeify.layers import sparse_layers
from moeify.parallel import Placement, distribute, move_experts, shard, spread
from moeify.sparsify import copies, fresh, lora, with_free
from tiny_models import causal_lm

EXPERTS = 8
RECIPES = {
    "stacks": Recipe(num_experts=EXPERTS, experts=fresh),
    "modules": Recipe(num_experts=EXPERTS, where=linears("up_proj"), experts=partial(copies, noise=0.1)),
    "kinds": Recipe(num_experts=EXPERTS, experts=with_free),
    "adapters": Recipe(num_experts=EXPERTS, where=linears("up_proj"), experts=lora),
}


def spread_all(model, group=None):
    for layer in sparse_layers(model).values():
        layer.module.replace(experts=spread(layer.experts, group))
    return model


def moved(model, ranks, how):
    how(model)
    orders = torch.stack([torch.arange(EXPERTS).roll(3), torch.arange(EXPERTS).flip(0)])
    move_experts(model, Placement(orders, ranks, EXPERTS))
    return model


def saved(rank, ranks, folder, recipe, how):
    """Case: the files of the model as one process saves it, and as all do, by name."""
    torch.manual_seed(0)
    model = sparsify(causal_lm("llama"), RECIPES[recipe], verbose=False)
    if rank == 0:
        save(model, folder / "one")
    sizes = {"fsdp_size": ranks, "ep_size": 2}
    ways = {
        "shard": lambda: shard(model, ep=2),
        "replicas": lambda: shard(model, ep=2, fsdp=False),
        "moved": lambda: moved(model, 2, partial(shard, ep=2)),
        "spread": lambda: spread_all(model),
        "distribute": lambda: distribute(model, sizes),
        "moved by distribute": lambda: moved(model, 2, partial(distribute, config=sizes)),
    }
    ways[how]()
    save(model, folder / "many")
    return {place: {file.name: file.read_bytes() for file in (folder / place).iterdir()} for place in ("one", "many")}


@pytest.mark.parametrize(
    ("size", "recipe", "how"),
    [
        (4, "stacks", "shard"),
        (4, "stacks", "replicas"),
        (2, "stacks", "moved"),
        (2, "stacks", "spread"),
        (2, "stacks", "distribute"),
        (2, "stacks", "moved by distribute"),
        (4, "modules", "shard"),
        (2, "modules", "spread"),
        (2, "kinds", "shard"),
        (2, "adapters", "shard"),
        (2, "adapters", "spread"),
    ],
)
def test_the_whole_model_is_saved_byte_for_byte_as_in_one_process(ranks, tmp_path, size, recipe, how):
    for found in ranks(size, saved, tmp_path, recipe, how):
        assert "model.safetensors" in found["one"]
        assert found["many"].keys() == found["one"].keys()
        assert not [name for name, data in found["one"].items() if found["many"][name] != data]


def unwritable(rank, ranks, folder):
    """Case: what a process hears of a save that fails."""
    (folder / "file").write_text("")
    model = shard(sparsify(causal_lm("llama"), RECIPES["stacks"], verbose=False), ep=2)
    try:
        save(model, folder / "file")
    except OSError as error:
        return str(error)
    finally:
        dist.barrier()


def test_a_save_that_fails_is_an_error_on_all_processes(ranks, tmp_path):
    first, second = ranks(2, unwritable, tmp_path)
    assert first == second
    assert "file" in first
