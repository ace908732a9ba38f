"""Adapters of the tiny models as PEFT writes them, and libraries of them."""

import json
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moeify import MoE, Recipe, from_adapters, sparsify
from moeify.compose import save_gates
from moeify.compose.peft_files import read_adapter
from moeify.find import linears
from moeify.routers import Phatgoose
from moeify.sparsify import frozen, lora
from tiny_models import TINY, inputs

ATTENTION = ["q_proj", "v_proj"]


def make_adapter(folder: Path, targets=ATTENTION, rank: int = 2, *, seed: int = 0, base=None, **config) -> Path:
    """The folder of an adapter of the tiny Llama as PEFT would write it, with random weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, part in (TINY["llama"]() if base is None else base).named_modules():
        if name.rpartition(".")[2] in targets and isinstance(part, nn.Linear):
            A = torch.randn(rank, part.in_features, generator=generator) * 0.3
            B = torch.randn(part.out_features, rank, generator=generator) * 0.3
            tensors |= {f"base_model.model.{name}.lora_{side}.weight": t for side, t in (("A", A), ("B", B))}
    folder.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "bias": "none", "target_modules": targets} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def make_gates(folder: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    maps = read_adapter(folder).modules
    save_gates({name: torch.randn(low.A.shape[1], generator=generator) for name, low in maps.items()}, folder)
    return folder


def library(folders: dict[str, Path], router=Phatgoose, **options) -> nn.Module:
    return from_adapters(TINY["llama"]().eval(), folders, router, verbose=False, **options)


def layers(model: nn.Module) -> dict[str, MoE]:
    return {name: part for name, part in model.named_modules() if isinstance(part, MoE)}


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What a library holds of one adapter."""
    found = {}
    for module, layer in layers(model).items():
        if name in layer.experts.names:
            e = layer.experts.names.index(name)
            found |= {f"{module} {key}": t[e] for key, t in layer.experts.state_dict().items()}
            found[f"{module} gate"] = layer.router.weight[e]
    return found


def fill(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)


def adapted_llama(**recipe) -> nn.Module:
    parts = {"where": linears("_proj"), "experts": partial(lora, rank=3), "shared": frozen, "num_experts": 2} | recipe
    model = sparsify(TINY["llama"]().eval(), Recipe(**parts), verbose=False)
    fill(model)
    return model
