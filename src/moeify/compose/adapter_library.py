"""Adapter libraries: LoRA adapters of PEFT, trained independently, become experts beside the layers that they adapt."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moeify import registry
from moeify.compose.attach import AdapterLibrary, MakeRouter, adapted_linears, adapters_of, attach
from moeify.compose.peft_files import GATES, Adapter, read_adapter, write_files
from moeify.files import read_json, read_tensors, write_json, write_tensors
from moeify.find.dense import is_linear
from moeify.folders import finish
from moeify.layers import moe_layers
from moeify.moe import MoE
from moeify.origin import Origin
from moeify.routers.topk import TopK
from moeify.store.dtypes import fits
from moeify.store.hashes import check, listed_or_none, saving
from moeify.version import __version__


def from_adapters(
    base: nn.Module,
    adapters: Mapping[str, str | Path],
    router: MakeRouter = TopK,
    *,
    dropout: float = 0.0,
    verbose: bool = True,
) -> nn.Module:
    """Put LoRA adapters of PEFT beside the linear layers of the model that they were trained on; returns the model.

    Every linear layer that any of them adapts becomes a sparse layer, `y = W x + Σ g_j s_j B_j A_j x` over those that
    adapt it, with a router of its own. Ranks may differ: smaller ones are padded with zeros. So may the layers: a
    router of k experts selects all where there are fewer. If a folder also holds `gates.safetensors` (the name of a
    linear layer -> a vector of its width), its vectors become the adapter's rows of routers that have a row per expert.

    Args:
        base: the model that the adapters were trained on; a call that raises leaves it unchanged.
        adapters: the name of every adapter, and the folder that PEFT's `save_pretrained` wrote.
        router: makes a router from width and number of adapters.
        dropout: probability of dropping an input of an adapter in training.
        verbose: print a table of adapters and layers.

    Raises:
        FileNotFoundError: a folder without an adapter, or with a pickle only.
        TypeError: adapters without names.
        ValueError: an adapter that is not plain LoRA of linear layers, or of another model (the message names its
            tensors); a router that does not work with so few experts, or that looks at later tokens in a decoder.
    """
    _refuse_sparse(base)
    if not adapters:
        raise ValueError("there is no adapter to attach; give at least one: {'law': 'folder'}")
    if not isinstance(adapters, Mapping):
        raise TypeError(f"adapters must be folders by name, {{'law': 'folder'}}, not a {type(adapters).__name__}")
    read = {_checked(name): read_adapter(folder) for name, folder in adapters.items()}
    attach(base, read, AdapterLibrary(router, dropout))
    if verbose:
        _show(base, read)
    return base


def add_adapter(model: nn.Module, name: str, folder: str | Path, *, verbose: bool = True) -> nn.Module:
    """Add one adapter to a library, as the last expert of its linear layers; the others and their routers stay.

    The parameters of the layers that grow are new ones: make the optimizer afterwards.

    Args:
        model: what `from_adapters`, `load_adapters` or `sparsify(..., experts=lora)` made.
        name: what the adapter is called.
        folder: what PEFT's `save_pretrained` wrote.
        verbose: print a table of adapters and layers.

    Raises:
        FileNotFoundError: a folder without an adapter, or with a pickle only.
        ValueError: as in `from_adapters`; a name that is taken; a model without adapters. The model is unchanged.
    """
    present = adapters_of(model)
    if name in present:
        raise ValueError(f"the library has an adapter {name!r} already; choose another name")
    arriving = {_checked(name): read_adapter(folder)}
    attach(model, present | arriving, _library_of(model), allow_noncausal=True)
    replace(Origin.of(model), recipe=None).write_to(model)
    if verbose:
        _show(model, arriving)
    return model


def save_adapters(model: nn.Module, folder: str | Path) -> None:
    """Write one folder per adapter that PEFT reads, `router.safetensors`, and how to put it together in `moeify.json`.

    The base model is not written, as it is unchanged. A library that is in the folder already is replaced atomically,
    even if the process is killed; folders of adapters that this one does not have stay.

    Args:
        model: what `from_adapters`, `load_adapters`, `add_adapter` or `sparsify(..., experts=lora)` made.
        folder: created if missing.

    Raises:
        ValueError: a sparse layer that is no frozen linear layer with LoRA experts beside it; a router that no file can
            name.
        OSError: the disk is full, the folder cannot be written to, or another process is saving into it.
    """
    folder, library, adapters, linears = Path(folder), _library_of(model), adapters_of(model), adapted_linears(model)
    for module, here in linears.items():
        if any(parameter.requires_grad for parameter in here.dense.parameters()):
            raise ValueError(
                f"the linear layer {module} is trained with its adapters, so these alone do not tell what it computes; "
                + _alternative(model)
            )
    description = {
        "moeify": __version__,
        "router": registry.encode("router", library.router),
        "dropout": library.dropout,
        "adapters": list(adapters),
    }
    routers = {
        f"{module}.{key}": tensor
        for module, here in linears.items()
        for key, tensor in here.layer.router.state_dict().items()
    }
    with saving(folder) as stage:
        for name, adapter in adapters.items():
            write_files(
                adapter, stage.new / _checked(name),
                targets=_targets(model, list(adapter.modules)),
                transposed=not any(isinstance(linears[module].dense, nn.Linear) for module in adapter.modules),
                base=getattr(getattr(model, "config", None), "_name_or_path", ""),
            )  # fmt: skip
            stage.obsolete |= {f"{name}/{file}" for file in (GATES, *listed_or_none(folder / name))}
        write_tensors(stage.new / "router.safetensors", routers)
        write_json(stage.new / "moeify.json", description)


def load_adapters(
    base: nn.Module, folder: str | Path, router: MakeRouter | None = None, *, verbose: bool = False
) -> nn.Module:
    """Put a saved adapter library beside the linear layers of its base model, routers included; returns the same model.

    Args:
        base: the model that the adapters were trained on; a call that raises leaves it unchanged.
        folder: what `save_adapters` wrote.
        router: used in place of the saved one, for routers of your own.
        verbose: print a table of adapters and layers.

    Raises:
        FileNotFoundError: no such library, or a file of it is missing.
        ValueError: a damaged library, or one of another model; the message names the file or the tensors.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    _refuse_sparse(base)
    finish(folder)
    check(folder)
    for file in ("moeify.json", "router.safetensors"):
        if not os.path.lexists(folder / file):
            raise FileNotFoundError(f"there is no {file} in {folder}: it was not written by moeify.save_adapters")
    try:
        description = read_json(folder / "moeify.json")
        make = registry.decode("router", description["router"]) if router is None else router
        names, library = list(map(str, description["adapters"])), AdapterLibrary(make, float(description["dropout"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is damaged, or not written by moeify.save_adapters: {error!r}") from None
    routers = read_tensors(folder / "router.safetensors")
    adapters = {name: read_adapter(folder / _checked(name)) for name in names}
    prepare = partial(_fill_routers, routers, folder / "router.safetensors", exact=router is None)
    attach(base, adapters, library, allow_noncausal=True, prepare=prepare)  # checked before saving
    if verbose:
        show_adapters(base)
    return base


def _fill_routers(saved: dict[str, Tensor], file: Path, layers: Mapping[str, MoE], *, exact: bool) -> None:
    """Load the tensors of the routers from a file, which must hold all of them and, if `exact`, no others."""
    own = {
        f"{module}.{key}": (layer.router, key, tensor)
        for module, layer in layers.items()
        for key, tensor in layer.router.state_dict().items()
    }
    wrong = sorted(own.keys() ^ saved.keys() if exact else own.keys() - saved.keys()) + [
        name
        for name, (_, _, tensor) in own.items()
        if name in saved and (saved[name].shape != tensor.shape or not fits(tensor.dtype, saved[name].dtype))
    ]
    if wrong:
        raise ValueError(
            f"{file} is not of this library; missing, unexpected, or of another shape or dtype: {', '.join(wrong[:3])}"
            + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        )
    for module, layer in layers.items():
        layer.router.load_state_dict({key: saved[f"{module}.{key}"] for key in layer.router.state_dict()})


def _refuse_sparse(base: nn.Module) -> None:
    if layers := moe_layers(base):
        raise ValueError(
            f"this {type(base).__name__} is sparse already (see {next(iter(layers))}); add one more with "
            "add_adapter(model, name, folder), or start from the dense model"
        )


def show_adapters(model: nn.Module, console: Console | None = None) -> None:
    """Print which adapters are beside which linear layers."""
    table = Table(title="adapters", title_justify="left")
    for heading in ("linear layers", "count", "adapters (rank)", "router"):
        table.add_column(heading, no_wrap=heading != "adapters (rank)")
    rows: Counter[tuple[str, str, str]] = Counter()
    for module, here in adapted_linears(model).items():
        where = re.sub(r"(?<=\.)\d+(?=\.)", "*", module)
        who = ", ".join(f"{name} ({low.rank})" for name, low in here.adapters().items())
        rows[where, who, type(here.layer.router).__name__] += 1
    for (where, who, router), count in rows.items():
        table.add_row(where, str(count), who, router)
    (Console() if console is None else console).print(table)


def _show(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Print the library, and the adapters whose rows of the routers are not trained yet."""
    show_adapters(model)
    untrained = [name for name, adapter in adapters.items() if not adapter.gates]
    rows = [here.router_vectors for here in adapted_linears(model).values()]
    if untrained and any(each is not None and len(each) > 1 for each in rows):
        print(f"no gates in the folders of {', '.join(untrained)}: their rows of the routers are still to be trained")


def _library_of(model: nn.Module) -> AdapterLibrary:
    origin = Origin.of(model)
    if origin.adapters is not None:
        return origin.adapters
    first, *_ = adapted_linears(model).values()
    if origin.recipe is None:
        raise ValueError(
            f"how the routers of this {type(model).__name__} were made is not known; make it with sparsify"
        )
    return AdapterLibrary(origin.recipe.router, first.experts.dropout.p)


def _alternative(model: nn.Module) -> str:
    if Origin.of(model).recipe is None:
        return "freeze it if it is still that of the base, or merge adapters and base into one model (merge_into_base)"
    return "write the whole model with moeify.save, or make it with shared=frozen"


def _checked(name: str) -> str:
    """Check that a name can be the name of a folder, and return it."""
    if not re.fullmatch(r"\w[\w .+-]*", name):
        raise ValueError(
            f"an adapter cannot be called {name!r}: its name is that of its folder; use letters and digits"
        )
    return name


def _targets(model: nn.Module, modules: list[str]) -> list[str]:
    """The last parts of the names of linear layers, or their whole names where the last parts mean other layers too."""
    ends = sorted({module.rpartition(".")[2] for module in modules})
    meant = [
        name
        for name, part in model.named_modules()
        if name.rpartition(".")[2] in ends and (is_linear(part) or isinstance(part, MoE))
    ]
    return ends if sorted(meant) == sorted(modules) else sorted(modules)
