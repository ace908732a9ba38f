"""Models that claims start from, trained once and kept outside the repository."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
import transformers
from common.small import BATCH, llama
from common.training import drawn, train
from torch import Tensor, nn

from moeify import Recipe, env, sparsify
from moeify.files import read_tensors, write_tensors
from moeify.routers import TopK
from moeify.sparsify import fresh

SMALL_STEPS, SMALL_RATE, SMALL_EXPERTS = 600, 2e-3, 8

RANDOM = "random numbers"
"""Beside the weights: the state of torch's generator after training, from which a claim goes on."""


def small_bases(learnt: Tensor) -> dict[str, nn.Module]:
    """The small Llama, dense and with top-1 of 8 experts of the dense width, after 600 steps on these blocks."""
    router = partial(TopK, k=1, normalize=False)
    sparse = Recipe(num_experts=SMALL_EXPERTS, router=router, experts=fresh)
    build: dict[str, Callable[[], nn.Module]] = {
        "dense": llama,
        "sparse": lambda: sparsify(llama(), sparse, verbose=False),
    }
    learn = partial(train, batches=drawn(learnt, batch=BATCH), steps=SMALL_STEPS, seed=0, rate=SMALL_RATE)
    bases = {}
    for name, built in build.items():
        torch.manual_seed(0)
        bases[name] = trained_base(built(), learn, learnt, batch=BATCH)
    return bases


def trained_base(model: nn.Module, learn: partial[nn.Module], *data: Tensor, **numbers: float) -> nn.Module:
    """The model after `learn(model)`, read back where it was trained before; evaluating.

    A base is kept in `claim-bases` of `moeify.env.cache_folder()`. It is another one, and trained anew, if anything
    differs: the model before training, the data, the numbers, the source of what learns, or the versions of torch and
    transformers. What is drawn at random afterwards is the same in both cases.

    Args:
        model: as it was built, on a CPU.
        learn: a function that trains in place, with all that it needs.
        data: all that it learns from.
        numbers: that `learn` does not show, as the size of a batch that it draws.
    """
    file = _file(model, learn, data, numbers)
    if file.is_file():
        found = read_tensors(file)
        torch.set_rng_state(found.pop(RANDOM))
        model.load_state_dict(found)
        print(f"a base of {file}", flush=True)
        return model.eval()
    learn(model)
    kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    write_tensors(file, kept | {RANDOM: torch.get_rng_state()})
    return model.eval()


def _file(model: nn.Module, learn: partial[nn.Module], data: Iterable[Tensor], numbers: Mapping[str, float]) -> Path:
    settings = {name: value for name, value in learn.keywords.items() if isinstance(value, int | float)}
    told = (sorted((settings | numbers).items()), str(model), torch.__version__, transformers.__version__)
    key = hashlib.sha256(repr(told).encode() + inspect.getsource(learn.func).encode())
    for tensor in (*model.state_dict().values(), *data):
        key.update(repr((tensor.shape, tensor.dtype)).encode() + tensor.contiguous().numpy().tobytes())
    return env.cache_folder() / "claim-bases" / f"{key.hexdigest()[:32]}.safetensors"
