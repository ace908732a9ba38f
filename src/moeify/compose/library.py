"""Pools of adapters: LoRA adapters that were trained apart become the experts beside the maps that they adapt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from moeify import registry
from moeify.compose.attach import MakeRouter, Pool, adapted, adapters_of, attach
from moeify.compose.files import Adapter, read_adapter, write_adapter
from moeify.files import read_json, read_tensors, write_json, write_tensors
from moeify.find.dense import is_linear
from moeify.layers import moe_layers
from moeify.moe import MoE
from moeify.origin import Origin
from moeify.routers.topk import TopK
from moeify.version import __version__


def from_adapters(
    base: nn.Module,
    adapters: Mapping[str, str | Path],
    router: MakeRouter = TopK,
    *,
    dropout: float = 0.0,
    verbose: bool = True,
) -> nn.Module:
    """Put LoRA adapters of PEFT beside the linear maps of the model that they were trained on; returns the same model.

    Every map that is adapted by any of them gets a sparse layer, `y = W x + Σ g_j s_j B_j A_j x` over those that adapt
    it, with a router of its own. Ranks may differ: the smaller ones are filled up with zeros. So may the maps: a router
    that takes k experts takes them all where there are fewer. If a folder also holds `gates.safetensors` (the name of
    a map -> a vector of its width), its vectors become the adapter's rows of the routers that have a row per expert.

    Args:
        base: the model that the adapters were trained on; a call that raises leaves it as it was.
        adapters: the name of every adapter, and the folder that PEFT's `save_pretrained` wrote.
        router: makes a router from width and number of adapters.
        dropout: probability of dropping an input of an adapter in training.
        verbose: print a table of what was put where.

    Raises:
        FileNotFoundError: a folder without an adapter, or with a pickle only.
        ValueError: an adapter that is no plain LoRA of linear maps, or of another model, the message names its tensors;
            a router that cannot serve so few experts, or that looks at later tokens in a decoder.
    """
    if layers := moe_layers(base):
        raise ValueError(
            f"this {type(base).__name__} is sparse already (see {next(iter(layers))}); add to a pool with "
            "add_adapter(model, name, folder), or start from the dense model"
        )
    if not adapters:
        raise ValueError("there is no adapter to attach; give at least one: {'law': 'folder'}")
    read = {_checked(name): read_adapter(folder) for name, folder in adapters.items()}
    attach(base, read, Pool(router, dropout))
    if verbose:
        _show(base, read)
    return base


def add_adapter(model: nn.Module, name: str, folder: str | Path, *, verbose: bool = True) -> nn.Module:
    """Give a pool one more adapter, the last expert of its maps; the others and their routers stay as they are.

    The parameters of the layers that grow are new ones: make the optimizer afterwards.

    Args:
        model: what `from_adapters`, `load_adapters` or `sparsify(..., experts=lora)` made.
        name: what the adapter is called.
        folder: what PEFT's `save_pretrained` wrote.
        verbose: print a table of what is where.

    Raises:
        FileNotFoundError: a folder without an adapter, or with a pickle only.
        ValueError: as in `from_adapters`; a name that is taken; a model that is no pool. The model is as it was.
    """
    present = adapters_of(model)
    if name in present:
        raise ValueError(f"the pool has an adapter {name!r} already; choose another name")
    arriving = {_checked(name): read_adapter(folder)}
    attach(model, present | arriving, _pool(model), allow_noncausal=True)
    replace(Origin.of(model), recipe=None).write_to(model)
    if verbose:
        _show(model, arriving)
    return model


def save_adapters(model: nn.Module, folder: str | Path) -> None:
    """Write one folder per adapter that PEFT reads, `router.safetensors`, and how to put it together in `moeify.json`.

    The base model is not written: it is what it was.

    Args:
        model: what `from_adapters`, `load_adapters`, `add_adapter` or `sparsify(..., experts=lora)` made.
        folder: made if it is not there.

    Raises:
        ValueError: a sparse layer that is no frozen linear map beside low-rank experts; a router that no file can name.
    """
    folder, pool, adapters, maps = Path(folder), _pool(model), adapters_of(model), adapted(model)
    for module, here in maps.items():
        if any(parameter.requires_grad for parameter in here.dense.parameters()):
            raise ValueError(
                f"the map {module} is trained with its adapters, so these alone do not tell what it computes; write "
                "the whole model with moeify.save, or make it with shared=frozen"
            )
    description = {
        "moeify": __version__,
        "router": registry.encode("router", pool.router),
        "dropout": pool.dropout,
        "adapters": list(adapters),
    }
    for name, adapter in adapters.items():
        write_adapter(
            adapter, folder / _checked(name),
            targets=_targets(model, list(adapter.maps)),
            transposed=not any(isinstance(maps[module].dense, nn.Linear) for module in adapter.maps),
            base=getattr(getattr(model, "config", None), "_name_or_path", ""),
        )  # fmt: skip
    routers = {
        f"{module}.{key}": tensor
        for module, here in maps.items()
        for key, tensor in here.layer.router.state_dict().items()
    }
    write_tensors(folder / "router.safetensors", routers)
    write_json(folder / "moeify.json", description)


def load_adapters(
    base: nn.Module, folder: str | Path, router: MakeRouter | None = None, *, verbose: bool = False
) -> nn.Module:
    """Put a saved pool beside the maps of its base model again, routers included; returns the same model.

    Args:
        base: the model that the pool was made from.
        folder: what `save_adapters` wrote.
        router: used in place of the saved one, for routers of your own.
        verbose: print a table of what was put where.

    Raises:
        FileNotFoundError: no such pool, or a file of it is missing.
        ValueError: a damaged pool, or one of another model; the message names the tensors.
    """
    folder = Path(folder)
    for file in ("moeify.json", "router.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"there is no {file} in {folder}: it was not written by moeify.save_adapters")
    try:
        description = read_json(folder / "moeify.json")
        make = registry.decode("router", description["router"]) if router is None else router
        names, pool = list(map(str, description["adapters"])), Pool(make, float(description["dropout"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder} is damaged, or not written by moeify.save_adapters: {error!r}") from None
    routers = read_tensors(folder / "router.safetensors")
    adapters = {name: read_adapter(folder / _checked(name)) for name in names}
    attach(base, adapters, pool, allow_noncausal=True)  # whoever saved it allowed it
    for module, layer in moe_layers(base).items():
        own = layer.router.state_dict()
        saved = {key: routers.get(f"{module}.{key}") for key in own}
        wrong = [f"{module}.{key}" for key, t in saved.items() if t is None or t.shape != own[key].shape]
        if wrong:
            raise ValueError(f"router.safetensors in {folder} lacks {', '.join(wrong)}, or has another shape of it")
        layer.router.load_state_dict(saved)
    if verbose:
        show_pool(base)
    return base


def show_pool(model: nn.Module, console: Console | None = None) -> None:
    """Print which adapters are beside which maps."""
    table = Table(title="adapters", title_justify="left")
    for heading in ("linear maps", "of them", "adapters (rank)", "router"):
        table.add_column(heading, no_wrap=heading != "adapters (rank)")
    rows: Counter[tuple[str, str, str]] = Counter()
    for module, here in adapted(model).items():
        where = re.sub(r"(?<=\.)\d+(?=\.)", "*", module)
        who = ", ".join(f"{name} ({low.rank})" for name, low in here.adapters().items())
        rows[where, who, type(here.layer.router).__name__] += 1
    for (where, who, router), count in rows.items():
        table.add_row(where, str(count), who, router)
    (Console() if console is None else console).print(table)


def _show(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Print the pool, and whose rows of the routers nobody has trained yet."""
    show_pool(model)
    untrained = [name for name, adapter in adapters.items() if not adapter.gates]
    if untrained and any(here.rows is not None and len(here.rows) > 1 for here in adapted(model).values()):
        print(f"no gates in the folders of {', '.join(untrained)}: their rows of the routers are still to be trained")


def _pool(model: nn.Module) -> Pool:
    origin = Origin.of(model)
    if origin.adapters is not None:
        return origin.adapters
    first, *_ = adapted(model).values()
    if origin.recipe is None:
        raise ValueError(
            f"how the routers of this {type(model).__name__} were made is not known; make it with sparsify"
        )
    return Pool(origin.recipe.router, first.experts.dropout.p)


def _checked(name: str) -> str:
    """A name that can be that of a folder."""
    if not re.fullmatch(r"\w[\w .+-]*", name):
        raise ValueError(
            f"an adapter cannot be called {name!r}: its name is that of its folder; use letters and digits"
        )
    return name


def _targets(model: nn.Module, modules: list[str]) -> list[str]:
    """The ends of the names of linear maps, if these mean no other map; their names if they do."""
    ends = sorted({module.rpartition(".")[2] for module in modules})
    meant = [
        name
        for name, part in model.named_modules()
        if name.rpartition(".")[2] in ends and (is_linear(part) or isinstance(part, MoE))
    ]
    return ends if sorted(meant) == sorted(modules) else sorted(modules)
